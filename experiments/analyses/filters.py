"""Which rule should pick the small batch from the big one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.training import OnSelected
from bilevel.training.metrics import Row, even_intervals
from bilevel.types import UserError
from experiments.analyses.analysis import Analysis, Record, Run
from experiments.language_modeling.variant import Variant

DISTINCT = "distinct_rows"


@dataclass(frozen=True)
class Filters(Analysis):
    """Sampling strategies that filter the big batch (table 7).

    Trains SOBA (or --method) once with each filter, all with the same estimator of the α-gradient (softmax, which goes with
    every filter, at the rate that goes with it). uniform, for reference, is uniform sampling without a weighting network.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.2.
    """

    run_dir: Path = Path("runs/filters")
    """Where everything is written; the same command continues there."""
    filters: tuple[Literal["gumbel_top_k", "importance", "top_k", "top_fraction", "uniform"], ...] = (
        "gumbel_top_k", "importance", "top_k", "uniform",
    )  # fmt: skip
    """gumbel_top_k: sampling without replacement; importance: with replacement; top_k: the highest weights; top_fraction:
    uniform sampling among --weights.top-fraction of the rows with the highest weights."""

    columns: ClassVar[Mapping[str, str]] = {**Analysis.columns, DISTINCT: "distinct rows in a batch (%)"}
    heading: ClassVar[str] = "filter"
    apart: ClassVar[bool] = True

    def check(self) -> None:
        """As `Analysis.check`, and the flags of this analysis."""
        super().check()
        if len(set(self.filters)) < len(self.filters) or not self.filters:
            raise UserError(f"--filters {' '.join(self.filters)}: name at least one filter, and each only once.")
        if self.weights.specific_candidates:
            raise UserError(
                "--weights.specific-candidates does not go with this analysis, which counts distinct generic rows: leave it away."
            )

    def runs(self, seed: int) -> Iterator[Run]:
        """One run a filter."""
        variant = Variant(on_selected=lambda given: count_distinct(self.batch_size, given))
        for name in self.filters:
            method = "uniform" if name == "uniform" else self.learner
            chosen, estimator = (None, None) if name == "uniform" else (name, self.weights.estimator or "softmax")
            weights = dataclasses.replace(self.weights, filter=chosen, estimator=estimator)
            settings = self.settings(name, weights=weights)
            yield Run(name, settings, method, seed, variant)

    def results(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Adds the share of distinct rows over the last fifth of training, which the effective sample size is of, too."""
        rows = super().results(records)
        for row, record in zip(rows, records, strict=True):
            row[DISTINCT] = _at_the_end(record.metrics) if record.metrics else None
            if record.run.method == "uniform":
                row["effective_sample_size"] = None  # it is of the big batch, and uniform sampling loads none
        return rows


def distinct_share(ids: NDArray[np.integer[Any]], batch_size: int) -> float:
    """The distinct rows in a batch over its rows, on average over batches.

    Args:
      ids: int `[n * batch_size]`, the rows of n batches.
      batch_size: rows in a batch.
    """
    batches = np.sort(ids.reshape(-1, batch_size), axis=1)
    return float(1 - np.mean(np.diff(batches, axis=1, prepend=-1) == 0))


def count_distinct(batch_size: int, given: OnSelected | None) -> OnSelected:
    """Adds the metric `distinct_rows`, in percent, to what `given` finds in the rows that were trained on."""

    def on_selected(ids: NDArray[np.integer[Any]], step: int) -> Mapping[str, float]:
        found = {} if given is None else dict(given(ids, step))
        return found | {DISTINCT: 100 * distinct_share(ids, batch_size)}

    return on_selected


def _at_the_end(metrics: Sequence[Row]) -> float:
    rows = even_intervals(metrics, [DISTINCT])
    return float(np.mean([row[DISTINCT] for row in rows[-max(1, len(rows) // 5) :]]))
