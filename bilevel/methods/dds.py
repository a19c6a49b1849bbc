"""DDS: one step of θ's optimizer, unrolled."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.derivatives.linearization import FirstOrder
from bilevel.methods.base import Method, MethodUpdate, Problem, check_decay
from bilevel.types import Array, Params


class DDSState(NamedTuple):
    """State of `dds`."""

    specific_gradient: Params
    """Moving average of ∇L_spec(θ⁺), changed on α-steps; None without averaging."""


def dds(
    *, average_specific: float = 0.0, cosine: bool = False, unroll: optax.GradientTransformation | None = None
) -> Method:
    """Move α down the specific loss after one update of θ.

    This is differentiable data selection.

    With θ⁺ = θ + U(g), g = Σ w_i ∇ℓ_i and U the optimizer's update at its current state, the probe is

        p = (∂U/∂g)ᵀ ∇L_spec(θ⁺),

    exact for every optax transformation: U is pulled back by reverse mode, so momentum, Adam, clipping and weight decay
    need no formulas of their own. Where U has no derivative (Adam, in parameters whose gradient has always been 0) p is 0.
    An optimizer whose derivative is 0 teaches nothing: that of a sign (lion, sign_sgd, rprop) is 0 everywhere, that of one that
    gathers gradients (MultiSteps, apply_every) on the steps on which θ does not move. `init` warns of both; use another method
    (`soba`, `penalty`, `anograd()`), or the `micro_batches` of `make_step` to gather gradients.

    Args:
      average_specific: decay d of a moving average of ∇L_spec(θ⁺) over α-steps, m ← d·m + (1−d)·∇L_spec, used instead of
        the gradient of the one specific batch: less noise for small batches, no extra evaluation. 0 is the paper's. The
        average is also what α-steps without a specific batch of their own use (`probe_every` of `make_step`).
      cosine: a_i = cos(∇ℓ_i, p) instead of ⟨∇ℓ_i, p⟩, so that rows with large gradients gain nothing from their size. The norms
        of the rows' gradients cost b backward passes of all b rows, (1 + 2b)/3 plain steps by count: for small networks and
        batches. One row alone would be cheaper, but has another gradient where rows act on each other (BatchNorm).
      unroll: U is the first update of this transformation instead of that of θ's optimizer: `optax.sgd(ρ)` for the papers' plain
        step.

    Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, section 2.3 and equation 6,
      for other optimizers appendix A.1; for `cosine` section 3.2 and appendix A.1 (there of the specific gradient itself,
      instead of its pullback). Grangier et al., section 4.3.1, equation 3, unroll a step of plain SGD with a rate ρ of its
      own: `unroll=optax.sgd(ρ)`.
    """
    check_decay(average_specific)

    def init(part: Params) -> DDSState:
        return DDSState(trees.wide(jax.tree.map(jnp.zeros_like, part)) if average_specific else None)

    def aligned(problem: Problem, rows: FirstOrder, probe: Params) -> Array:
        alignments = rows.alignments(probe)
        if not cosine:
            return alignments
        scale = problem.row_norms() * trees.norm(probe)
        return jnp.where(scale > 0, alignments / jnp.where(scale > 0, scale, 1.0), 0.0)

    def update(problem: Problem, state: DDSState) -> MethodUpdate:
        rows = problem.first_order()
        moved, _, pullback = problem.lookahead(rows.gradient, unroll)
        loss, gradient = problem.specific_gradient(moved)
        if average_specific:
            gradient = trees.average(gradient, state.specific_gradient, average_specific)
            state = DDSState(gradient)
        return MethodUpdate(
            rows.losses, rows.aux, rows.gradient, aligned(problem, rows, pullback(gradient)), loss, state
        )

    def reuse(problem: Problem, state: DDSState) -> MethodUpdate:
        rows = problem.first_order()
        _, _, pullback = problem.lookahead(rows.gradient, unroll)
        alignments = aligned(problem, rows, pullback(state.specific_gradient))
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, alignments, None, state)

    return Method(init, update, reuse=reuse if average_specific else None, looks_ahead=unroll is None)
