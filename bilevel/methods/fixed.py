"""The two methods that learn nothing: uniform sampling, and a weighting network that stays as it is."""

from __future__ import annotations

from bilevel.methods.base import Method


def uniform() -> Method:
    """Trains on rows drawn uniformly from the generic data: the baseline. Nothing is scored."""
    return Method(init=lambda _: (), update=None, uses_weights=False)


def frozen() -> Method:
    """Selects with the weighting network that the state holds, and never changes it.

    Weights learned with a small model serve a large one in this way.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.4.
    """
    return Method(init=lambda _: (), update=None)
