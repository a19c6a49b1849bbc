"""Which rule should pick the small batch from the big one?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.study.config import Config
from bilevel.study.context import Setting, Variant
from bilevel.study.tables import Column
from bilevel.study.task import Measure
from bilevel.tools.analyses.base import OfLearner, Planned, in_folder
from bilevel.training.metrics import even_intervals, mean_of
from bilevel.training.settings import flag_of
from bilevel.types import UserError

DISTINCT = "distinct_rows"


@dataclass(frozen=True)
class Filters(OfLearner):
    """Sampling strategies that filter the big batch (table 7).

    Trains SOBA (or --learner) once with each filter, all with the same estimator of the α-gradient (softmax, which goes with
    every filter, at the rate that goes with it). uniform, for reference, is uniform sampling without a weighting network.
    After Grangier et al. (2024), section 6.2.
    """

    filters: tuple[Literal["gumbel_top_k", "importance", "top_k", "top_fraction", "uniform"], ...] = (
        "gumbel_top_k", "importance", "top_k", "uniform",
    )  # fmt: skip
    """gumbel_top_k: sampling without replacement; importance: with replacement; top_k: the highest weights; top_fraction:
    uniform sampling among the learner's top-fraction of the rows with the highest weights."""

    name: ClassVar[str] = "filters"
    apart: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {DISTINCT: Column("distinct rows in a batch (%)")}

    def check(self, config: Config) -> None:
        """Refuse filters named twice, and specific rows in the big batch."""
        super().check(config)
        if len(set(self.filters)) < len(self.filters) or not self.filters:
            raise UserError(f"--filters {' '.join(self.filters)}: name at least one filter, and each only once.")
        if config.methods[self.learner].specific_candidates:
            flag = flag_of(f"{self.learner}.specific_candidates")
            raise UserError(f"{flag} does not go with this analysis, which counts distinct generic rows: omit it.")

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan one run a filter."""
        variant = Variant(on_selected=functools.partial(distinct, setting.config.study.batch_size))
        own = setting.config.methods[self.learner]
        for name in self.filters:
            chosen = dataclasses.replace(own, filter=name, estimator=own.estimator or "softmax")
            here = in_folder(setting.of(setting.config.with_method(self.learner, chosen)), name)
            yield Planned(name, here.context("uniform" if name == "uniform" else self.learner, seed, variant))

    def added(self, run: Planned, runs: Sequence[Planned], measure: Measure) -> dict[str, Any]:
        """Return the distinct rows over the last fifth of training, which the effective sample size is of, too."""
        rows = even_intervals(run.metrics, [DISTINCT])
        return {DISTINCT: mean_of(rows[-max(1, len(rows) // 5) :], DISTINCT)}


def distinct(batch_size: int, ids: NDArray[np.integer[Any]], step: int) -> Mapping[str, float]:
    """Return the metric `distinct_rows`: the distinct rows in a batch in percent of its rows, the mean over batches."""
    counts = [len(np.unique(batch)) for batch in ids.reshape(-1, batch_size)]
    return {DISTINCT: 100 * float(np.mean(counts)) / batch_size}
