"""Do gradient alignments say what learned weights will gain?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bilevel.study import files
from bilevel.study.config import Config, plain
from bilevel.study.evaluation import trained
from bilevel.study.run import Run, Setting
from bilevel.study.sets import named_sets
from bilevel.study.suite import opened
from bilevel.study.tables import Column
from bilevel.study.task import Measure, Task
from bilevel.tools.analyses.base import (
    OF_COMPARISONS,
    OfLearner,
    Planned,
    Record,
    Results,
)
from bilevel.tools.diagnose.measure import RATES, Compared, Measurement

MEASURED = "acceleration.json"
"""In the directory of a uniform run: the rates of its last parameters."""


@dataclass(frozen=True)
class Acceleration(Compared, OfLearner):
    """Acceleration rates beside the gain of learned weights (table 8).

    For each specific set, trains with uniform sampling and with SOBA (or --learner). On the uniform model at its end it measures
    how often a row's gradient aligns better with a batch of its own kind than with one of the other: the specific and the
    generic acceleration rate (SAR, GAR). The gain is what the learner improves the test measure of uniform by.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.3.
    """

    name: ClassVar[str] = "acceleration"
    unused: ClassVar[tuple[str, ...]] = (*OF_COMPARISONS, "compare", "finetune")
    sparse: ClassVar[bool] = False

    def check(self, config: Config) -> None:
        """As `OfLearner.check`, and the flags of this analysis."""
        super().check(config)
        self.check_sizes()
        named_sets(config)

    def opened(self, config: Config, task: Task) -> list[Setting]:
        """Open the data of each set.

        Raises:
          UserError: for data that are missing, broken or too small to train or to measure on.
        """
        found = [opened(own, task) for _, own in named_sets(config)]
        for setting in found:
            Measurement(setting, self, config.study.seed)
        return found

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan uniform sampling, then the learner."""
        for method in ("uniform", self.learner):
            yield Planned(f"{_set(setting)}: {method}", setting, method, seed)

    def measured(self, planned: Planned) -> dict[str, float]:
        """Return the rates of the uniform model, measured once for the same flags."""
        if planned.method != "uniform":
            return {}
        settings = plain(Compared(self.rows, self.pairs, self.batch_rows))
        file = planned.directory / MEASURED
        kept = files.read_json(file) if file.exists() else {}
        if kept.get("settings") == settings:
            return kept["results"]
        setting, method, seed, variant = planned[1:]
        state = Run(setting, method, seed, variant).checkpoint()
        found = Measurement(setting, self, seed)(trained(state, setting.mesh))
        results = {name: found[name] for each in RATES for name in (each, f"{each}_error")}
        results |= {f"{name}_percent": 100 * value for name, value in results.items()}
        files.write_json(file, {"settings": settings, "results": results})
        return results

    def results(self, records: Sequence[Record], measure: Measure) -> list[dict[str, Any]]:
        """Add the gain of the learner over uniform of the same set and seed."""
        name, rows = f"test_{measure.name}", super().results(records, measure)
        uniform = {(_set(r.run.setting), r.run.seed): r.summary[name] for r in records if r.run.method == "uniform"}
        for row, (run, *_) in zip(rows, records, strict=True):
            if run.method != "uniform":
                gain = uniform[_set(run.setting), run.seed] - row[name]
                row["gain"] = gain if measure.lower_is_better else -gain
        return rows

    def columns(self, measure: Measure, results: Results) -> dict[str, Column]:
        """Return the test measure, the gain, and the rates of the uniform model in percent with their standard errors."""
        found = {f"test_{measure.name}": Column(f"test {measure.title}", measure.digits)}
        found["gain"] = Column("gain over uniform", measure.digits)
        for each in RATES:
            found |= {f"{each}_percent": Column(f"{each.upper()} (%)", 1)}
            found |= {f"{each}_error_percent": Column("standard error", 1)}
        return found


def _set(setting: Setting) -> str:
    return named_sets(setting.config)[0][0]
