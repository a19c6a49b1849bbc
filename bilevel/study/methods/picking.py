"""How a big batch is filtered by a weighting network: settings that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax

from bilevel.data import GROUP
from bilevel.selection import filters
from bilevel.study.context import Context
from bilevel.types import UserError

FilterName: TypeAlias = Literal[
    "gumbel_top_k", "importance", "top_k", "top_fraction", "threshold", "uniform", "one_of_group"
]
PROPORTIONAL = ("gumbel_top_k", "importance")
"""Filters that draw rows in proportion to their weights."""


@dataclass(frozen=True)
class Picking:
    """How rows are picked from the big batch."""

    filter: FilterName = "gumbel_top_k"
    """How rows are picked; one_of_group: one of the source languages of each target sentence, of whole targets."""
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

    def rule(self) -> filters.Filter:
        """Build the filter."""
        match self.filter:
            case "uniform":
                return filters.uniform()
            case "top_fraction":
                return filters.top_fraction(self.top_fraction)
            case "threshold":
                return filters.threshold(self.threshold)
            case "one_of_group":
                factory = partial(filters.one_of_group, GROUP)
            case name:
                factory = getattr(filters, name)
        return factory(temperature=self.temperature, min_effective_fraction=self.min_effective_fraction)

    def candidates(self, context: Context) -> int:
        """Return the specific rows in a big batch, which leave a generic one, and can be shared by all processes."""
        count, size, flag = self.specific_candidates, context.study.big_batch_size, context.flag
        if not 0 <= count < size:
            raise UserError(
                f"--{flag}.specific-candidates {count} of --big-batch-size {size}: give 0 or more, and fewer."
            )
        if count % jax.process_count():
            raise UserError(
                f"--{flag}.specific-candidates {count} cannot be divided among {jax.process_count()} processes: give a "
                "multiple."
            )
        return count
