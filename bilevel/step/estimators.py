"""From alignments to cotangents of the logits: Σ a_i ∇_α w_i = Σ c_i ∇_α s_i.

Three estimators of the α-gradient. With `softmax` the weights are renormalised over the rows at hand. With `score` the rows
themselves were drawn in proportion to the weights, so that the score-function estimator applies, with the mean of the
other rows as its baseline. With `uniform` every row of a batch that was drawn uniformly teaches alike, whatever its weight.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from bilevel.devices.axis import ALONE, Axis
from bilevel.trees import widen
from bilevel.types import Array

Estimator = Literal["softmax", "score", "uniform"]


def total(x: Array, axis: Axis) -> Array:
    """Sum over the rows of all devices."""
    return axis.sum(jnp.sum(x))


def softmax(logits: Array, axis: Axis = ALONE) -> Array:
    """Compute the softmax over the rows of all devices, `[b]` -> `[b]`; 0 for all where every logit is −∞."""
    peak = axis.max(jax.lax.stop_gradient(jnp.max(logits)))
    unnormalised = jnp.exp(logits - jnp.where(peak > -jnp.inf, peak, 0.0))
    mass = total(unnormalised, axis)
    return unnormalised / jnp.where(mass > 0, mass, 1.0)


def entropy_pull(bonus: float, logits: Array, pool: Array, temperature: Array, axis: Axis = ALONE) -> Array | None:
    """Compute λ (s_i − s̄), `[b]`, the `pull` of `logit_cotangents`; None without a bonus. Rows without a logit have 0.

    Args:
      bonus: λ.
      logits: s_i, `[b]`.
      pool: the tempered logits of this device's rows of the big batch; s̄ is the mean of those that are finite.
      temperature: what they were divided by.
      axis: the devices that the rows are spread over.
    """
    if not bonus:
        return None
    known = jnp.isfinite(pool)
    centre = total(jnp.where(known, pool, 0.0), axis) / jnp.maximum(total(known, axis), 1) * temperature
    return jnp.where(jnp.isfinite(logits), bonus * (widen(logits) - centre), 0.0)


def shift_pull(
    strength: float, logits: Array, temperature: Array, estimator: Estimator, axis: Axis = ALONE
) -> Array | None:
    """Compute κ E_w[s], a scalar, the `shift` of `logit_cotangents`; None without.

    A shift of all logits changes no weight, so that nothing else holds it, and a network with bounded logits loses them all
    where they drift to its bound. E_w[s] is the mean over the rows if these were drawn by their weights, else the weighted mean.

    Args:
      strength: κ.
      logits: s_i, `[b]`; those that are not finite have no part.
      temperature: what they are divided by where they become weights.
      estimator: that of `logit_cotangents`.
      axis: the devices that the rows are spread over.
    """
    if not strength:
        return None
    known = jnp.isfinite(logits)
    drawn = known / jnp.maximum(total(known, axis), 1)
    weights = softmax(logits / temperature, axis) if estimator == "softmax" else drawn
    return strength * total(jnp.where(known, weights * widen(logits), 0.0), axis)


def left_out(logits: Array, alignments: Array, left: Array, axis: Axis = ALONE) -> tuple[Array, Array]:
    """Take the say from rows that are not `left`, bool `[b]`: logits of −∞, and alignments at the mean of the others."""
    known = total(jnp.where(left, alignments, 0.0), axis) / jnp.maximum(total(left, axis), 1)
    return jnp.where(left, logits, -jnp.inf), jnp.where(left, alignments, known)


def logit_cotangents(
    alignments: Array,
    logits: Array,
    estimator: Estimator,
    *,
    num_rows: int,
    normalize: bool = False,
    pull: Array | None = None,
    shift: Array | None = None,
    axis: Axis = ALONE,
) -> Array:
    """Compute the cotangents c_i of the logits, float32 `[b]`.

    softmax: c_i = w_i (a_i − Σ_j w_j a_j), w the softmax of the logits over the rows.
    score:   c_i = (a_i − ā_{−i})/b, ā_{−i} the mean of the other rows: unbiased for ∇_α E_{i∼w}[a_i] when the rows were
             drawn from w with replacement.
    uniform: c_i = a_i/b − w_i ā, that is (1/b) Σ a_i ∇log w_i (Wang et al., DDS, algorithm 1, line 9): not the gradient of
             Σ w_i a_i, in which rows of little weight say little, but it never stops listening to them.

    Args:
      alignments: a_i(p), `[b]`.
      logits: s_i of the same rows, tempered, `[b]`.
      estimator: "softmax", "score" or "uniform".
      num_rows: b over all devices.
      normalize: divide the alignments by the root mean square of their deviations from the mean first (a running reward scale of
        1, whatever the norm of the probe); all-equal alignments give 0.
      pull: λ (s_i − s̄), `[b]`, added to the alignments after scaling: the entropy bonus of `make_step`; None: nothing.
      shift: κ E_w[s], see `shift_pull`; it moves all logits together, so that no baseline takes it away. None: nothing.
      axis: the devices that the rows are spread over.
    """
    mean = total(alignments, axis) / num_rows
    centred = alignments - mean
    if normalize:
        deviation = jnp.sqrt(total(centred**2, axis) / num_rows)
        # Below the rounding of the alignments themselves there is nothing but noise to blow up.
        noise = jnp.finfo(alignments.dtype).eps * jnp.abs(mean)
        scale = jnp.where(deviation > noise, 1.0 / jnp.maximum(deviation, 1e-30), 0.0)
        centred, mean = centred * scale, mean * scale
    if pull is not None:
        pulled = total(pull, axis) / num_rows
        centred, mean = centred + pull - pulled, mean + pulled
    together = 0.0 if shift is None else shift
    if estimator == "score":
        # a_i − ā_{−i} = (a_i − ā)·b/(b − 1)
        return (centred + together) / max(num_rows - 1, 1)
    weights = softmax(logits, axis)
    if estimator == "uniform":
        return (centred + mean + together) / num_rows - weights * mean
    return weights * (centred - total(weights * centred, axis) + together)
