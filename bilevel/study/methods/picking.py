"""How a big batch is filtered by a weighting network: settings that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from bilevel.selection import filters
from bilevel.study.config import Study
from bilevel.types import UserError

FilterName: TypeAlias = Literal["gumbel_top_k", "importance", "top_k", "top_fraction", "threshold", "uniform"]
PROPORTIONAL = ("gumbel_top_k", "importance")
"""Filters that draw rows in proportion to their weights."""


@dataclass(frozen=True)
class Picking:
    """How rows are picked from the big batch."""

    filter: FilterName = "gumbel_top_k"
    """How rows are picked."""
    temperature: float = 1.0
    """Of the filter: higher is closer to uniform."""
    min_effective_fraction: float = 0.0
    """Floor under the effective sample size, as a share of the big batch."""
    top_fraction: float = 0.1
    """top_fraction: share of the big batch that rows are drawn from."""
    threshold: float = 0.0
    """threshold: logit above which rows are drawn; 0: what a domain classifier holds for specific rather than generic."""
    specific_candidates: int = 0
    """Specific training rows in each big batch, which may be picked too."""


def filter_of(settings: Picking) -> filters.Filter:
    """Build the filter that the settings name."""
    if settings.filter == "uniform":
        return filters.uniform()
    if settings.filter == "top_fraction":
        return filters.top_fraction(settings.top_fraction)
    if settings.filter == "threshold":
        return filters.threshold(settings.threshold)
    factory = {"gumbel_top_k": filters.gumbel_top_k, "importance": filters.importance, "top_k": filters.top_k}
    return factory[settings.filter](
        temperature=settings.temperature, min_effective_fraction=settings.min_effective_fraction
    )


def check_sizes(study: Study) -> None:
    """Refuse a big batch that leaves nothing to pick.

    Raises:
      UserError: if it is smaller than the batch.
    """
    if study.big_batch_size < study.batch_size:
        raise UserError(
            f"--big-batch-size {study.big_batch_size} is smaller than --batch-size {study.batch_size}: the batch is picked "
            "from the big batch, so give a larger big batch."
        )


def candidates(settings: Picking, study: Study, flag: str, processes: int) -> int:
    """Return the specific rows in a big batch.

    Raises:
      UserError: if they leave no generic row, or cannot be shared.
    """
    count, size = settings.specific_candidates, study.big_batch_size
    if not 0 <= count < size:
        raise UserError(f"--{flag}.specific-candidates {count} of --big-batch-size {size}: give 0 or more, and fewer.")
    if count % processes:
        raise UserError(
            f"--{flag}.specific-candidates {count} cannot be divided among {processes} processes: give a multiple."
        )
    return count
