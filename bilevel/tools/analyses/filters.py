"""Which rule should pick the small batch from the big one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.study.config import Config
from bilevel.study.run import Setting, Variant
from bilevel.study.tables import Column
from bilevel.study.task import Measure
from bilevel.tools.analyses.base import OfLearner, Planned, Record, Results, in_folder
from bilevel.training import OnSelected
from bilevel.training.metrics import Row, even_intervals
from bilevel.types import UserError

DISTINCT = "distinct_rows"


@dataclass(frozen=True)
class Filters(OfLearner):
    """Sampling strategies that filter the big batch (table 7).

    Trains SOBA (or --learner) once with each filter, all with the same estimator of the α-gradient (softmax, which goes with
    every filter, at the rate that goes with it). uniform, for reference, is uniform sampling without a weighting network.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.2.
    """

    filters: tuple[Literal["gumbel_top_k", "importance", "top_k", "top_fraction", "uniform"], ...] = (
        "gumbel_top_k", "importance", "top_k", "uniform",
    )  # fmt: skip
    """gumbel_top_k: sampling without replacement; importance: with replacement; top_k: the highest weights; top_fraction:
    uniform sampling among the learner's top-fraction of the rows with the highest weights."""

    name: ClassVar[str] = "filters"
    heading: ClassVar[str] = "filter"
    apart: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        """As `OfLearner.check`, and the flags of this analysis."""
        super().check(config)
        if len(set(self.filters)) < len(self.filters) or not self.filters:
            raise UserError(f"--filters {' '.join(self.filters)}: name at least one filter, and each only once.")
        if config.methods[self.learner].specific_candidates:
            flag = f"--{self.learner.replace('_', '-')}.specific-candidates"
            raise UserError(f"{flag} does not go with this analysis, which counts distinct generic rows: omit it.")

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan one run a filter."""
        variant = Variant(on_selected=count_distinct(setting.config.study.batch_size))
        own = setting.config.methods[self.learner]
        for name in self.filters:
            chosen = dataclasses.replace(own, filter=name, estimator=own.estimator or "softmax")
            here = in_folder(setting.of(setting.config.with_method(self.learner, chosen)), name)
            yield Planned(name, here, "uniform" if name == "uniform" else self.learner, seed, variant)

    def columns(self, measure: Measure, results: Results) -> dict[str, Column]:
        """As `Analysis.columns`, and the distinct rows."""
        return super().columns(measure, results) | {DISTINCT: Column("distinct rows in a batch (%)")}

    def results(self, records: Sequence[Record], measure: Measure) -> list[dict[str, Any]]:
        """Add the share of distinct rows over the last fifth of training, which the effective sample size is of, too."""
        rows = super().results(records, measure)
        for row, record in zip(rows, records, strict=True):
            row[DISTINCT] = _at_the_end(record.metrics) if record.metrics else None
            if record.run.method == "uniform":
                row["effective_sample_size"] = None  # it is of the big batch, and uniform sampling loads none
        return rows


def count_distinct(batch_size: int) -> OnSelected:
    """Return what adds the metric `distinct_rows`: the distinct rows in a batch in percent of its rows, the mean over batches."""

    def on_selected(ids: NDArray[np.integer[Any]], step: int) -> Mapping[str, float]:
        batches = np.sort(ids.reshape(-1, batch_size), axis=1)
        return {DISTINCT: 100 * float(1 - np.mean(np.diff(batches, axis=1, prepend=-1) == 0))}

    return on_selected


def _at_the_end(metrics: Sequence[Row]) -> float:
    rows = even_intervals(metrics, [DISTINCT])
    return float(np.mean([row[DISTINCT] for row in rows[-max(1, len(rows) // 5) :]]))
