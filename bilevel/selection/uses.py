"""A cap on how often a row is trained on ("consume once"): counts in the training state, by the rows' `id`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.devices.axis import Axis
from bilevel.types import Array, Batch, UserError

_MOST = 255
"""What a count of one byte can hold."""


@dataclass(frozen=True)
class MaxUses:
    """No row is trained on more than so many times.

    A row that was has the logit −∞ from then on. Where fewer than b rows of a big batch are left, the θ-update is the mean over
    these, and α learns from them alone; where none is left, the gradient is 0. Big batches have an array `id`, int32 `[B]`; a row
    without a number (−1) is never used up.

    Raises:
        UserError: a number is out of range.
    """

    rows: int
    """N: ids are below this. The counts take a byte a row, on every device."""
    times: int = 1
    """Between 1 and 255."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"MaxUses(rows={self.rows}) must be the number of rows, at least 1.")
        if not 1 <= self.times <= _MOST:
            raise UserError(f"MaxUses(times={self.times}) must be at least 1 and at most {_MOST}.")

    def init(self) -> Array:
        """Return the counts of a run that begins, uint8 `[N]`."""
        return jnp.zeros(self.rows, jnp.uint8)

    def left(self, uses: Array, batch: Batch) -> Array:
        """Tell which rows of a batch may be trained on, bool `[b]`.

        Raises:
            UserError: the batch has no `id`.
        """
        ids = _ids(batch)
        # A negative number would count from the end.
        found = uses.at[jnp.where(ids < 0, self.rows, ids)].get(mode="fill", fill_value=0)
        return found < self.times

    def counted(self, uses: Array, batch: Batch, trained: Array, axis: Axis) -> Array:
        """Add a use to the rows of a batch, this device's share, that were trained on (bool `[b]`)."""
        ids = jnp.where(trained, _ids(batch), -1)
        ids = axis.gather(jnp.where(ids < 0, self.rows, ids))
        return uses.at[ids].add(jnp.ones((), jnp.uint8), mode="drop")


def _ids(batch: Batch) -> Array:
    if not isinstance(batch, dict) or "id" not in batch:
        raise UserError(
            "max_uses counts by the array 'id' of the rows, int32 [B], and the big batch has none: add it, or omit max_uses."
        )
    return jax.lax.stop_gradient(jnp.asarray(batch["id"]))
