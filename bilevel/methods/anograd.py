"""Anograd: the cosine between the generic and the specific gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.linearization import FirstOrder
from bilevel.methods.base import Method, MethodUpdate, Problem, check_decay
from bilevel.types import Array, Params


class AnogradState(NamedTuple):
    """State of `anograd`."""

    specific_gradient: Params
    """Moving average of ∇L_spec(θ), changed on α-steps; None without averaging."""


def anograd(*, average_specific: float = 0.0, through_optimizer: bool = False) -> Method:
    """Turn the weighted generic gradient towards the specific one.

    This is the aligned normalised gradient.

    With g = Σ w_i ∇ℓ_i, ĝ = g/‖g‖, ŝ = ∇L_spec(θ)/‖∇L_spec(θ)‖ and c = ⟨ĝ, ŝ⟩, the probe is the gradient of −c in g,

        p = −(ŝ − c ĝ)/‖g‖.

    Rows with large gradients gain nothing from their size, unlike with DDS.

    Args:
      average_specific: decay of a moving average of ∇L_spec over α-steps; see `dds`. 0 is the paper's.
      through_optimizer: compare the specific gradient with the move U(g) that θ's optimizer makes of g, instead of g:
        p = (∂U/∂g)ᵀ ∇_U cos(U, ∇L_spec). The same as the paper's for SGD, where U = −ρg; for Adam it measures rows in the
        geometry in which θ moves.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
      section 4.3.3.
    """
    check_decay(average_specific)

    def init(part: Params) -> AnogradState:
        return AnogradState(trees.wide(jax.tree.map(jnp.zeros_like, part)) if average_specific else None)

    def aligned(problem: Problem, rows: FirstOrder, specific: Params) -> Array:
        if through_optimizer:
            _, updates, pullback = problem.lookahead(rows.gradient)
            towards = cosine_probe(problem.subset.restrict(updates), specific)
            return rows.alignments(pullback(jax.tree.map(jnp.negative, towards)))
        return rows.alignments(cosine_probe(problem.subset.restrict(rows.gradient), specific))

    def update(problem: Problem, state: AnogradState) -> MethodUpdate:
        rows = problem.first_order()
        loss, specific = problem.specific_gradient(trees.after(problem.params, rows.gradient))
        if average_specific:
            specific = trees.average(specific, state.specific_gradient, average_specific)
            state = AnogradState(specific)
        alignments = aligned(problem, rows, specific)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, loss, state)

    def reuse(problem: Problem, state: AnogradState) -> MethodUpdate:
        rows = problem.first_order()
        alignments = aligned(problem, rows, state.specific_gradient)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, None, state)

    return Method(init, update, reuse=reuse if average_specific else None, looks_ahead=through_optimizer)


def cosine_probe(generic: Params, specific: Params) -> Params:
    """Compute the gradient of −cos(g, s) in g; 0 where either vector is 0."""
    tiny = jnp.finfo(jnp.float32).tiny
    generic_norm = jnp.maximum(trees.norm(generic), tiny)
    specific_norm = jnp.maximum(trees.norm(specific), tiny)
    # The norms apart: their product may be too small for the type.
    cosine = trees.dot(generic, specific) / generic_norm / specific_norm
    defined = (generic_norm > tiny) & (specific_norm > tiny)

    def leaf(g: jax.Array, s: jax.Array) -> jax.Array:
        towards = -((s / specific_norm - cosine * g / generic_norm) / generic_norm)
        return jnp.where(defined, towards, 0).astype(g.dtype)

    return jax.tree.map(leaf, generic, specific)
