"""SOBA: implicit differentiation with a tracked solution of the linear system."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.derivatives.optimizers import check_optimizer
from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.types import Array, Params, UserError


class SOBAState(NamedTuple):
    """State of `soba`; both fields change on α-steps."""

    v: Params
    """The tracker of −(∇²L_gen + λI)⁻¹ ∇L_spec, 0 at first; over the chosen part of θ."""
    opt_state: optax.OptState
    """State of the tracker's own optimizer."""


def soba(
    optimizer: optax.GradientTransformation,
    *,
    damping: float = 0.0,
    max_norm: float | None = None,
    dtype: jnp.dtype | None = None,
) -> Method:
    """Move α along v, which follows −H⁻¹∇L_spec as θ and α move.

    This is the stochastic bilevel algorithm.

        dv = ∇²L_gen(θ) v + λ v + ∇L_spec(θ),      v ← v − η dv,      p = v (before this move).

    Args:
      optimizer: the optax transformation that turns dv into the move of v (`optax.sgd(η)` is the paper's iteration).
      damping: λ ≥ 0, added to the Hessian. The Hessian of a network that still learns has negative directions; without
        damping v grows along them.
      max_norm: bound on ‖v‖, kept by scaling v; None leaves v free.
      dtype: type in which v is stored; None takes that of θ. bfloat16 halves its memory, but rounds moves
        below 1/500 of v away: with a small rate, v then stays where it is.

    Raises:
      UserError: for a negative damping or a bound that is not positive.

    Reference: Dagréou et al., "A framework for bilevel optimization that enables stochastic and global variance reduction
      algorithms", NeurIPS 2022, section 2.2; Grangier et al., section 4.3.2. Damping, the bound and the choice of optimizer
      are ours.
    """
    if damping < 0:
        raise UserError(f"soba(damping={damping}) must not be negative: 0 leaves the Hessian as it is.")
    if max_norm is not None and max_norm <= 0:
        raise UserError(f"soba(max_norm={max_norm}) must be positive, or None for no bound.")

    def init(part: Params) -> SOBAState:
        v = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype), part)
        check_optimizer(optimizer, v, "soba's optimizer")
        return SOBAState(v, optimizer.init(v))

    def update(problem: Problem, state: SOBAState) -> MethodUpdate:
        part = problem.subset.restrict(problem.params)
        probe = jax.tree.map(lambda v, x: v.astype(x.dtype), state.v, part)
        rows = problem.second_order(probe)
        loss, specific = problem.specific_gradient(trees.after(problem.params, rows.hessian_product))

        def direction(hv: Array, v: Array, s: Array) -> Array:
            return (hv + damping * v + s).astype(v.dtype)

        dv = jax.tree.map(direction, rows.hessian_product, state.v, specific)
        updates, opt_state = optimizer.update(dv, state.opt_state, state.v)
        v = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), state.v, updates)
        if max_norm is not None:
            v = trees.bounded(v, max_norm)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, rows.alignments, loss, SOBAState(v, opt_state))

    def reuse(problem: Problem, state: SOBAState) -> MethodUpdate:
        part = problem.subset.restrict(problem.params)
        rows = problem.first_order()
        alignments = rows.alignments(jax.tree.map(lambda v, x: v.astype(x.dtype), state.v, part))
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, None, state)

    return Method(init, update, reuse=reuse)
