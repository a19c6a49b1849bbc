"""First-order bilevel optimisation by a penalty, with a reference model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.derivatives.optimizers import check_optimizer
from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.types import Array, Params, UserError


class PenaltyState(NamedTuple):
    """State of `penalty`; both fields change on α-steps."""

    offset: Params
    """d = φ − θ, where the reference model φ is, 0 at first; over the chosen part of θ."""
    opt_state: optax.OptState
    """State of the offset's own optimizer."""


def penalty(optimizer: optax.GradientTransformation, *, strength: float = 1.0) -> Method:
    """Prefer rows that cost a reference model less than the main model.

    Their alignment is a_i = ℓ_i(φ) − ℓ_i(θ).

    The reference φ = θ + d trains on generic rows like θ, and on specific rows as well:

        dd = ∇L_gen(θ + d) − ∇L_gen(θ) + s ∇L_spec(θ + d),      d ← d − η dd,

    so that φ goes towards the minimum of L_gen + s L_spec while θ goes to that of L_gen. Σ w_i(α) a_i is then the gap between
    the two in the inner loss, whose α-gradient tends to s times the hypergradient as s → 0: `soba` is that limit, with
    d = s v and the differences ∇L_gen(θ + d) − ∇L_gen(θ) and ℓ_i(θ + d) − ℓ_i(θ) instead of derivatives. With s that is not
    small the differences see the curvature between the two models. Costs what `soba` costs with `Finite()`.

    Args:
      optimizer: the optax transformation that turns dd into the move of d.
      strength: s > 0, the weight of the specific loss for the reference. With optimizers that ignore the size of the gradient,
        such as Adam, it counts only relative to the generic term.

    Raises:
      UserError: for a strength that is not positive.

    Reference: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023,
      algorithm 1 (there with two inner models and a strength that falls; here θ is the one of them that is trained anyway).
    """
    if strength <= 0:
        raise UserError(f"penalty(strength={strength}) must be positive.")

    def init(part: Params) -> PenaltyState:
        offset = jax.tree.map(jnp.zeros_like, part)
        check_optimizer(optimizer, offset, "penalty's optimizer")
        return PenaltyState(offset, optimizer.init(offset))

    def reference(problem: Problem, offset: Params, after: Params) -> Params:
        part = problem.subset.restrict(problem.params)
        return problem.subset.merge(trees.after(trees.axpy(1.0, offset, part), after), problem.params)

    def gaps(state: PenaltyState, there: Array, here: Array) -> Array:
        # Of two equal models rounding alone would be left, for normalisation to blow up.
        return jnp.where(trees.norm(state.offset) > 0, there - here, 0.0)

    def update(problem: Problem, state: PenaltyState) -> MethodUpdate:
        rows = problem.first_order()
        at = reference(problem, state.offset, rows.gradient)
        losses, gradient = problem.rows_at(at)
        loss, specific = problem.specific_gradient(trees.after(at, gradient))

        def direction(there: Array, here: Array, s: Array) -> Array:
            return (there - here + strength * s).astype(s.dtype)

        moved = jax.tree.map(direction, gradient, problem.subset.restrict(rows.gradient), specific)
        updates, opt_state = optimizer.update(moved, state.opt_state, state.offset)
        alignments = gaps(state, losses, rows.losses)
        state = PenaltyState(optax.apply_updates(state.offset, updates), opt_state)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, loss, state)

    def reuse(problem: Problem, state: PenaltyState) -> MethodUpdate:
        rows = problem.first_order()
        losses, _ = problem.rows_at(reference(problem, state.offset, rows.gradient))
        alignments = gaps(state, losses, rows.losses)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, None, state)

    return Method(init, update, reuse=reuse)
