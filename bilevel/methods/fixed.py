"""The two methods that learn nothing: uniform, and a frozen weighting network."""

from __future__ import annotations

from bilevel.methods.base import Method


def uniform() -> Method:
    """Train on rows drawn uniformly from the generic data: the baseline.

    Nothing is scored.
    """
    return Method(init=lambda _: (), update=None, uses_weights=False)


def frozen() -> Method:
    """Select with the weighting network that the state holds, and never change it.

    Weights learned with a small model serve a large one in this way.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.4.
    """
    return Method(init=lambda _: (), update=None)
