"""Do gradient alignments say what learned weights will gain?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bilevel.study import files
from bilevel.study.config import Config, plain
from bilevel.study.evaluation import trained
from bilevel.study.run import Run, Setting
from bilevel.study.sets import named_sets
from bilevel.study.suite import opened
from bilevel.study.tables import markdown, mean_cell
from bilevel.study.task import Measure, Task
from bilevel.tools.analyses.base import OF_COMPARISONS, OfLearner, Planned, Record, Results
from bilevel.tools.diagnose import report
from bilevel.tools.diagnose.measure import RATES, Compared, Measurement, rate

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
        files.write_json(file, {"settings": settings, "results": results})
        return results

    def results(self, records: Sequence[Record], measure: Measure) -> list[dict[str, Any]]:
        """Return one line for each set and seed."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for run, summary, _ in records:
            found.setdefault((_set(run.setting), run.seed), {})[run.method] = summary
        return [
            {"specific_set": name, "seed": seed, "learner": self.learner}
            | _gain(both["uniform"], both[self.learner], measure)
            for (name, seed), both in found.items()
        ]

    def table(self, results: Results, measure: Measure) -> str:
        """Return one line for each set."""
        title, values = f"test {measure.title}", ("uniform", "learned", "gain")
        heads = ("specific set", "seeds", f"{title}, uniform", f"{title}, {self.learner}", "gain", "SAR", "GAR")
        lines = []
        for name, rows in _by_set(results).items():
            cells = [mean_cell([row[x] for row in rows], measure.digits) for x in values]
            lines.append([name, str(len(rows)), *cells, *(rate(_mean(rows), each) for each in RATES)])
        unit = f" in {measure.unit}" if measure.unit else ""
        return (
            f"{markdown(heads, lines)}\n\nTest {measure.title} on the specific set{unit}; rates of the uniform model at its end ± "
            "one standard error of measuring (chance is 50 %)."
        )

    def plot(self, records: Sequence[Record], measure: Measure) -> str:
        """Draw the rates of each set against its gain, as SVG."""
        means = {name: _mean(rows) for name, rows in _by_set(self.results(records, measure)).items()}
        label = f"gain of {self.learner} over uniform ({measure.unit or measure.title})"
        return report.plot(list(means.values()), "gain", label, list(means))


def _set(setting: Setting) -> str:
    return named_sets(setting.config)[0][0]


def _gain(uniform: Mapping[str, Any], learner: Mapping[str, Any], measure: Measure) -> dict[str, float]:
    before, after = (summary[f"test_{measure.name}"] for summary in (uniform, learner))
    gain = before - after if measure.lower_is_better else after - before
    rates = {name: uniform[name] for each in RATES for name in (each, f"{each}_error")}
    return {"uniform": before, "learned": after, "gain": gain, **rates}


def _by_set(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        found.setdefault(row["specific_set"], []).append(row)
    return found


def _mean(rows: Results) -> dict[str, float]:
    """The mean over seeds, and the standard errors of the mean rates."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("gain", *RATES)}
    errors = {f"{name}_error": math.hypot(*(row[f"{name}_error"] for row in rows)) / len(rows) for name in RATES}
    return means | errors
