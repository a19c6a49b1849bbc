"""Do gradient alignments say what learned weights will gain?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bilevel.offline.acceleration import RATES
from bilevel.study.config import Config
from bilevel.study.context import Setting
from bilevel.study.run import Run
from bilevel.study.sets import named_sets
from bilevel.study.suite import opened
from bilevel.study.tables import Column
from bilevel.study.task import Measure, Task
from bilevel.tools.analyses.base import OF_COMPARISONS, OfLearner, Planned, baseline
from bilevel.tools.diagnose.measure import Compared, Measurement
from bilevel.training.evaluation import trained


@dataclass(frozen=True)
class Acceleration(Compared, OfLearner):
    """Acceleration rates beside the gain of learned weights (table 8).

    For each specific set, trains with uniform sampling and with SOBA (or --learner). On the uniform model at its end it measures
    how often a row's gradient aligns better with a batch of its own kind than with one of the other: the specific and the
    generic acceleration rate (SAR, GAR). The gain is what the learner improves the test measure of uniform by.
    After Grangier et al. (2024), section 6.3.
    """

    name: ClassVar[str] = "acceleration"
    unused: ClassVar[tuple[str, ...]] = (*OF_COMPARISONS, "compare", "finetune")
    sparse: ClassVar[bool] = False
    columns: ClassVar[Mapping[str, Column]] = {
        "gain": Column("gain over uniform", 3),
        "sar_percent": Column("SAR (%)", 1), "sar_error_percent": Column("standard error", 1),
        "gar_percent": Column("GAR (%)", 1), "gar_error_percent": Column("standard error", 1),
    }  # fmt: skip

    def check(self, config: Config) -> None:
        """Refuse sets of one name."""
        super().check(config)
        named_sets(config)

    def opened(self, config: Config, task: Task) -> list[Setting]:
        """Open the data of each set; raises a UserError for too few rows to measure on."""
        for setting in (found := [opened(own, task) for _, own in named_sets(config)]):
            Measurement(setting, self, config.study.seed)
        return found

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan uniform sampling, then the learner."""
        ((name, _),) = named_sets(setting.config)
        for method in ("uniform", self.learner):
            yield Planned(f"{name}: {method}", setting.context(method, seed))

    def added(self, run: Planned, runs: Sequence[Planned], measure: Measure) -> dict[str, Any]:
        """Return the rates of a uniform model, or the gain of the learner over that of the same set and seed."""
        context = run.context
        if context.method == "uniform":
            found = Measurement(context, self, context.seed)(trained(Run(context).checkpoint(), context.mesh))
            rates = {name: found[name] for rate in RATES for name in (rate, f"{rate}_error")}
            return rates | {f"{name}_percent": 100 * value for name, value in rates.items()}
        own, uniform = (one.summary[f"test_{measure.name}"] for one in (run, baseline(run, runs)))
        return {"gain": uniform - own if measure.lower_is_better else own - uniform}
