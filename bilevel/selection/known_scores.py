"""Scores that are known beforehand: one number an example, looked up by its id."""

from __future__ import annotations

import jax.numpy as jnp

from bilevel.selection.scorers import Scorer, of_losses
from bilevel.types import Array, LossFn, Params


def rho_loss(loss: LossFn, *, id: str = "id", micro_batches: int = 1) -> Scorer:
    """Score rows by the reducible held-out loss, ℓ_i(θ) − IL_i.

    It is high for rows that are not yet learned, but can be, as the held-out data show.

    The scorer's parameters are {"table": IL}, float32 `[N]`: the losses of a model trained on held-out data, computed once
    (`bilevel.offline.irreducible`) and good for every model that is trained on these rows.

    Args:
      loss: see `scoring.train_loss`; the same kind of loss as in the table.
      id: name of the example numbers in the batch, integer `[B]`. A row without an entry is selected after all others.
      micro_batches: see `scoring.train_loss`.

    Reference: RHO-LOSS, equation 6 and algorithm 1.
    """

    def logits(weights: Params, batch: dict[str, Array], losses: Array) -> Array:
        return losses + look_up(-weights["table"], batch[id])

    return of_losses(loss, logits, micro_batches=micro_batches)


def irreducible_loss(*, id: str = "id") -> Scorer:
    """Score rows by the negative irreducible loss, −IL_i.

    The easiest rows come first, noisy ones last. Parameters and `id` as `rho_loss`.

    Reference: RHO-LOSS, section 5 and figure 1.
    """
    return Scorer(_nothing, lambda weights, batch, _: look_up(-weights["table"], batch[id]))


def by_id(*, id: str = "id") -> Scorer:
    """Score rows by a number known beforehand; large is selected.

    Parameters {"table": float32 `[N]`}; `id` as `rho_loss`.
    """
    return Scorer(_nothing, lambda weights, batch, _: look_up(weights["table"], batch[id]))


def look_up(table: Array, ids: Array) -> Array:
    """Look up the scores of examples.

    An example without one gets −∞, the score that is selected last.

    Args:
      table: float32 `[N]`, NaN where an example has no score.
      ids: integer `[b]`; those outside 0..N−1 have no score.

    Returns:
      float32 `[b]`.
    """
    inside = (ids >= 0) & (ids < table.shape[0])
    found = table[jnp.where(inside, ids, 0)]
    return jnp.where(inside & ~jnp.isnan(found), found, -jnp.inf)


def _nothing(*_: object) -> tuple[()]:
    return ()
