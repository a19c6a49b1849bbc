"""Self-paced curriculum learning: easy rows first, harder ones as the pace grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.types import Array, Batch, Params, UserError

_ROUNDS, _PARTS = 8, 16
"""The multiplier is sought in this many rounds, each of which keeps one of so many parts of an interval."""
_LEAST = 1e-6
"""Bounds below this are taken for it."""


class SPCLState(NamedTuple):
    """State of `spcl`."""

    step: Array
    """int32 scalar: θ-updates done. λ is a function of it."""


def spcl(
    pace: float | optax.Schedule,
    *,
    curriculum: Callable[[Batch], Array] | None = None,
    bound: float | optax.Schedule | None = None,
) -> Method:
    """Weigh rows by how small their loss is, with the linear self-paced function

        v_i = 1 − ℓ_i(θ)/λ if ℓ_i < λ, else 0,      θ moves by its optimizer's update of (1/B) Σ v_i ∇ℓ_i:

    rows whose loss is λ or more take no part; with λ = 0 that is every row, one of loss 0 included. λ grows as the model
    learns, so that harder rows join in. v minimises Σ v_i ℓ_i + λ Σ (v_i²/2 − v_i) over v ∈ [0, 1]ᴮ (so that a negative loss
    has v_i = 1). Dense mode, no weighting network, no specific batch used:

        pace = optax.linear_schedule(1.0, 5.0, transition_steps=10_000)
        train = make_step(loss, None, optimizer, None, spcl(pace), mode="dense", batch_size=B)

    A row of C classes at the loss of guessing, log C, has v = 1/2 with λ = 2 log C and 2/3 with 3 log C. With the paces of a
    comparison, 2 to 3 log C, such a row is therefore never excluded, only one whose label the model holds for unlikelier than
    C⁻² to C⁻³.

    With a curriculum, what is known beforehand of how hard each row is, a_i ≥ 0, restrains v to the region Σ a_i v_i ≤ c Σ a_i
    over the rows of the batch. The minimum then is

        v_i = clip(1 − (ℓ_i + μ a_i)/λ, 0, 1) with the smallest μ ≥ 0 for which the constraint holds:

    of two rows of equal loss the easier one has no less weight. The units of a_i are of no account, and nothing changes while
    the constraint holds by itself, as with c ≥ 1.

        spcl(pace, curriculum=lambda batch: batch["length"], bound=0.5)

    Costs what a plain step costs; on several devices a curriculum adds eight sums of 17 numbers over them. `metrics["weights"]`
    holds v_i/B; where no row has any weight, θ still moves by its optimizer's update of a gradient of 0, and the metrics of the
    weights are NOT_COMPUTED.

    Args:
      pace: λ, or a schedule from the number of θ-updates to it, in the unit of the loss; a number must be positive.
      curriculum: batch -> a_i, `[b]`, larger for harder rows; negative ones count as 0. None: no curriculum region.
      bound: c, or a schedule from the number of θ-updates to it, which grows to let harder rows in; a number must be positive.

    Raises:
      UserError: for a pace or a bound that is a number and not positive, or only one of curriculum and bound.

    Reference: Jiang, Meng, Zhao, Shan, Hauptmann, "Self-paced curriculum learning", AAAI 2015: of its schemes the linear one
      alone, and its curriculum region aᵀv ≤ c for the rows of a batch instead of all rows, with c as a share of Σ a_i. Without
      a curriculum this is plain self-paced learning: Kumar, Packer, Koller, "Self-paced learning for latent variable models",
      NeurIPS 2010 (λ grows by a constant factor: `optax.exponential_decay` with a rate above 1); a baseline in Wang et al.
      (DDS), section 4.
    """
    if not callable(pace) and pace <= 0:
        raise UserError(f"spcl(pace={pace}) must be positive: the loss from which a row has no weight.")
    if (curriculum is None) != (bound is None):
        raise UserError("spcl(curriculum=…, bound=…) go together: give both, or neither.")
    if bound is not None and not callable(bound) and bound <= 0:
        raise UserError(
            f"spcl(bound={bound}) must be positive: the share of the rows' difficulty that may be trained on."
        )

    def init(part: Params) -> SPCLState:
        return SPCLState(jnp.zeros((), jnp.int32))

    def update(problem: Problem, state: SPCLState) -> MethodUpdate:
        rows = problem.first_order()
        threshold = jnp.asarray(pace(state.step) if callable(pace) else pace)
        count = problem.total(jnp.ones_like(rows.losses))
        easy = rows.losses < threshold
        share = jnp.where(easy, 1.0 - rows.losses / jnp.where(threshold > 0, threshold, 1.0), 0.0)
        if curriculum is not None:
            limit = jnp.asarray(bound(state.step) if callable(bound) else bound)
            share = restrained(share, _difficulty(curriculum, problem.batch, share), limit, problem.total)
        weights = jnp.minimum(share, 1.0) / count
        gradient = rows.reweighted(weights)
        return MethodUpdate(rows.losses, rows.aux, gradient, None, None, SPCLState(state.step + 1), weights)

    return Method(init, update, uses_weights=False, chooses_weights=True)


def restrained(shares: Array, difficulty: Array, bound: Array, total: Callable[[Array], Array]) -> Array:
    """Compute v_i = clip(e_i − u a_i, 0, 1) with the smallest u ≥ 0 for which Σ a_i v_i ≤ c Σ a_i.

    The sum falls as u grows, and a v ≤ max over t of a t with e − u a ≥ t, which is e²/(4u): so u lies between 0 and
    Σ e²/(4c Σ a), an interval that each round cuts to a 16th.

    Args:
      shares: e_i = 1 − ℓ_i/λ, `[b]`; 0 or less excludes a row.
      difficulty: a_i ≥ 0, `[b]`.
      bound: c.
      total: values of rows `[b]` -> their sum over the rows of all devices.
    """
    count, whole = total(jnp.ones_like(difficulty)), total(difficulty)
    scaled = difficulty * (count / jnp.where(whole > 0, whole, 1.0))  # of mean 1, so that their unit is of no account
    limit = jnp.maximum(bound, _LEAST).astype(shares.dtype) * count

    def weights(u: Array) -> Array:
        return jnp.clip(shares - u * scaled, 0.0, 1.0)

    def cut(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        points = low + (high - low) * (jnp.arange(_PARTS + 1) / _PARTS).astype(low.dtype)
        sums = jax.vmap(lambda u: total(scaled * weights(u)))(points)
        first = jnp.argmax((sums <= limit).at[-1].set(True))  # rounding aside, the last one is small enough
        return points[jnp.maximum(first - 1, 0)], points[first]

    most = total(jnp.maximum(shares, 0.0) ** 2) / (4.0 * limit)
    return weights(jax.lax.fori_loop(0, _ROUNDS, cut, (jnp.zeros_like(most), most))[1])


def _difficulty(curriculum: Callable[[Batch], Array], batch: Batch, shares: Array) -> Array:
    found = curriculum(batch)
    if jnp.shape(found) != shares.shape:
        raise UserError(
            f"The curriculum of spcl gives an array of shape {jnp.shape(found)} for {shares.shape[0]} rows: give one number for "
            "each."
        )
    return jnp.maximum(jax.lax.stop_gradient(found), 0.0).astype(shares.dtype)
