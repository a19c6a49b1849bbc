"""Self-paced curriculum learning: easy rows first, harder ones as the pace grows."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax

from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.types import Array, Params, UserError


class SPCLState(NamedTuple):
    """State of `spcl`."""

    step: Array
    """int32 scalar: θ-updates done. λ is a function of it."""


def spcl(pace: float | optax.Schedule) -> Method:
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

    Costs what a plain step costs. `metrics["weights"]` holds v_i/B; where no row has any weight, θ still moves by its optimizer's
    update of a gradient of 0, and the metrics of the weights are NOT_COMPUTED.

    Args:
      pace: λ, or a schedule from the number of θ-updates to it, in the unit of the loss; a number must be positive.

    Raises:
      UserError: for a pace that is a number and not positive.

    Reference: Jiang, Meng, Zhao, Shan, Hauptmann, "Self-paced curriculum learning", AAAI 2015: of its schemes
      the linear one alone, and without its curriculum region (what is known beforehand about which rows are easy), so that
      this is plain self-paced learning; Kumar, Packer, Koller, "Self-paced learning for latent variable models", NeurIPS 2010
      (λ grows by a constant factor: `optax.exponential_decay` with a rate above 1); a baseline in Wang et al. (DDS), section 4.
    """
    if not callable(pace) and pace <= 0:
        raise UserError(f"spcl(pace={pace}) must be positive: the loss from which a row has no weight.")

    def init(part: Params) -> SPCLState:
        return SPCLState(jnp.zeros((), jnp.int32))

    def update(problem: Problem, state: SPCLState) -> MethodUpdate:
        rows = problem.first_order()
        threshold = jnp.asarray(pace(state.step) if callable(pace) else pace)
        count = problem.total(jnp.ones_like(rows.losses))
        easy = rows.losses < threshold
        share = jnp.minimum(1.0, 1.0 - rows.losses / jnp.where(threshold > 0, threshold, 1.0))
        weights = jnp.where(easy, share, 0.0) / count
        gradient = rows.reweighted(weights)
        return MethodUpdate(rows.losses, rows.aux, gradient, None, None, SPCLState(state.step + 1), weights)

    return Method(init, update, uses_weights=False, chooses_weights=True)
