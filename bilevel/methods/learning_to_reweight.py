"""Learning to reweight: free weights for every batch, no weighting network."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.methods.base import Method, MethodUpdate, Problem


def learning_to_reweight(*, unroll: optax.GradientTransformation | None = None) -> Method:
    """Weigh each batch by the gradient of its weights, free parameters, at uniform.

    At uniform weights, with θ⁺ = θ + U(g) and g = (1/B) Σ ∇ℓ_i, the probe is that of DDS,

        p = (∂U/∂g)ᵀ ∇L_spec(θ⁺),      w̃_i = max(−a_i(p), 0) / Σ_j max(−a_j(p), 0),

    uniform if all are 0 or one is not finite. Then θ moves by its optimizer's update of Σ w̃_i ∇ℓ_i. Rows whose weight would
    raise the specific loss after one update of θ take no part in it. Nothing is kept from step to step, so every step does the
    work, all rows of the big batch are evaluated (dense mode), and there is neither a weighting network nor an optimizer for
    it:

        train = make_step(loss, None, optimizer, None, learning_to_reweight(), mode="dense", batch_size=B)
        state = train.init(rng, params)

    The very first update of Adam does not depend on the size of the gradient: its alignments, and with them the weights of
    step 0, are rounding.

    Over a plain step (3F) it costs the specific gradient (3F), the alignments (2F, or 1F by differences) and a second
    backward pass (2F). The metrics of the weights describe w̃, which `metrics["weights"]` holds.

    Args:
      unroll: U is the first update of this transformation instead of that of θ's optimizer: `optax.sgd(ρ)` for a plain step.

    Reference: Ren, Zeng, Yang, Urtasun, "Learning to reweight examples for robust deep learning", ICML 2018, algorithm 1;
      Grangier et al., section 5.1. Both differ from this. Ren et al. start from weights 0 and unroll plain SGD, so that
      ∇L_spec is taken at θ; here it is taken after the update by θ's own optimizer at uniform weights. Where no row is of
      use, theirs stay 0, and θ where it is. Grangier et al. take the gradient at uniform weights, as here, and weigh by
      uniform weights plus one step along it (no formula is given; in our symbols 1/B − η a_i); here, as with Ren et al., the
      useful part of the gradient alone is the weight.
    """

    def update(problem: Problem, state: tuple[()]) -> MethodUpdate:
        rows = problem.first_order()
        moved, _, pullback = problem.lookahead(rows.gradient, unroll)
        loss, gradient = problem.specific_gradient(moved)
        probe = pullback(gradient)
        # Differences along a probe of 0 are rounding, which normalising would make weights of.
        alignments = jnp.where(trees.norm(probe) > 0, rows.alignments(probe), 0.0)
        useful = jnp.maximum(-alignments, 0.0)
        mass, count = problem.total(useful), problem.total(jnp.ones_like(useful))
        some = (mass > 0) & jnp.isfinite(mass)
        weights = jnp.where(some, useful / jnp.where(some, mass, 1.0), 1.0 / count)
        return MethodUpdate(rows.losses, rows.aux, rows.reweighted(weights), alignments, loss, state, weights)

    return Method(lambda _: (), update, uses_weights=False, chooses_weights=True, looks_ahead=unroll is None)
