"""Implicit differentiation: a linear system solved anew on every α-step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.methods.base import Method, MethodUpdate, Problem, check_decay
from bilevel.types import Array, Params, UserError

Product: TypeAlias = Callable[[Params], Params]
Solver: TypeAlias = Callable[[Product, Params, Params | None], Params]
"""(d -> (H + λI) d, right side b, first guess or None) -> approximate solution."""

FLATTEST = 1e-3
"""Conjugate gradient stops at a curvature below this part of the largest one it met: differences of float32 gradients
cannot tell it from 0, and steps of a length beyond all bounds would follow."""


class ImplicitState(NamedTuple):
    """State of `implicit_cg` and `implicit_neumann`; both fields change on α-steps."""

    specific_gradient: Params
    """Moving average of ∇L_spec(θ); None without averaging."""
    probe: Params
    """The previous probe, 0 at first; None without a warm start."""


def implicit_cg(
    *,
    iterations: int = 5,
    damping: float = 0.1,
    warm_start: bool = False,
    max_norm: float | None = None,
    average_specific: float = 0.0,
) -> Method:
    """Differentiate implicitly, by conjugate gradient.

        p = −(H + λI)⁻¹ ∇L_spec(θ),      H = ∇² Σ w_i ℓ_i(θ) on the α-rows,

    after k iterations, each of which costs one Hessian product. The system is that which `soba` tracks, solved on the rows
    of one step alone.

    The Hessian of a network that still learns is indefinite, and conjugate gradient is made for positive definite systems.
    It therefore stops where it meets a direction d with dᵀ(H + λI)d ≤ 0 (or too small to tell), and keeps the solution so
    far; if that is the first direction, the probe is −∇L_spec, that of one step of gradient descent (truncated Newton).
    It also stops at directions whose curvature is below a thousandth of the largest met: a larger damping makes fewer of them.

    Args:
      iterations: k ≥ 1.
      damping: λ ≥ 0.
      warm_start: begin at the previous probe instead of 0: one Hessian product more. It pays if θ and the rows change little
        between α-steps.
      max_norm: bound on ‖p‖, kept by scaling p; None leaves p free.
      average_specific: decay of a moving average of ∇L_spec over α-steps; see `dds`.

    Raises:
      UserError: for a value out of range.

    Reference: Grangier et al., section 4.3.2 (the hypergradient, there with a tracked solution); Pedregosa, "Hyperparameter
      optimization with approximate gradient", ICML 2016 (conjugate gradient); Nocedal and Wright, "Numerical optimization",
      2nd edition, algorithm 7.1 (stopping at negative curvature). Damping, warm start and the bound are options of ours.
    """
    _check("implicit_cg", iterations, damping, max_norm)

    def solve(product: Product, right: Params, guess: Params | None) -> Params:
        return conjugate_gradient(product, right, guess, iterations)

    return _implicit(solve, damping, warm_start, max_norm, average_specific)


def implicit_neumann(
    *,
    iterations: int = 5,
    step_size: float = 0.1,
    damping: float = 0.0,
    warm_start: bool = False,
    max_norm: float | None = None,
    average_specific: float = 0.0,
) -> Method:
    """Differentiate implicitly, by a truncated Neumann series.

        p = −η Σ_{j=0..k} (I − η(H + λI))ʲ ∇L_spec(θ)  →  −(H + λI)⁻¹ ∇L_spec(θ),

    with H as in `implicit_cg`: k iterations of gradient descent on the system, each of which costs one Hessian product.
    Unlike conjugate gradient it needs η < 2/(largest eigenvalue + λ), and then sees an indefinite Hessian as it is: negative
    directions grow, by (1 + η|μ|)ᵏ at most.

    Args:
      iterations: k ≥ 1.
      step_size: η > 0.
      damping: λ ≥ 0.
      warm_start: begin at the previous probe instead of −η∇L_spec, at no further cost.
      max_norm: bound on ‖p‖, kept by scaling p; None leaves p free.
      average_specific: decay of a moving average of ∇L_spec over α-steps; see `dds`.

    Raises:
      UserError: for a value out of range.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020,
      algorithm 3. Damping, warm start and the bound are options of ours.
    """
    _check("implicit_neumann", iterations, damping, max_norm)
    if step_size <= 0:
        raise UserError(f"implicit_neumann(step_size={step_size}) must be positive.")

    def solve(product: Product, right: Params, guess: Params | None) -> Params:
        return neumann_series(product, right, guess, iterations, step_size)

    return _implicit(solve, damping, warm_start, max_norm, average_specific)


def conjugate_gradient(product: Product, right: Params, guess: Params | None, iterations: int) -> Params:
    """Approximate A⁻¹b in k iterations of conjugate gradient.

    It stops early at negative curvature, as `implicit_cg` says.

    Args:
      product: d -> A d, A symmetric.
      right: b.
      guess: where to begin; None for 0, which saves one product.
      iterations: k.
    """
    start = jax.tree.map(jnp.zeros_like, right) if guess is None else guess
    residual = right if guess is None else trees.axpy(-1.0, product(guess), right)

    def go_on(carry: _Conjugate) -> Array:
        return carry.going & (carry.done < iterations) & (carry.squared > 0)

    def iterate(c: _Conjugate) -> _Conjugate:
        image = product(c.direction)
        curvature, length = trees.dot(c.direction, image), trees.dot(c.direction, c.direction)
        bent = curvature <= FLATTEST * c.steepest * length
        step = c.squared / jnp.where(bent, 1.0, curvature)
        moved = trees.axpy(step, c.direction, c.solution)
        kept = trees.choose(c.done == 0, right, c.solution)
        residual = trees.axpy(-step, image, c.residual)
        squared = trees.dot(residual, residual)
        return _Conjugate(
            trees.choose(bent, kept, moved),
            residual,
            trees.axpy(squared / c.squared, c.direction, residual),
            squared,
            jnp.maximum(c.steepest, curvature / length),
            c.done + 1,
            ~bent,
        )

    squared = trees.dot(residual, residual)
    zero = jnp.zeros_like(squared)
    first = _Conjugate(start, residual, residual, squared, zero, jnp.zeros((), jnp.int32), jnp.asarray(True))
    return jax.lax.while_loop(go_on, iterate, first).solution


def neumann_series(product: Product, right: Params, guess: Params | None, iterations: int, step_size: float) -> Params:
    """Approximate A⁻¹b by the first k + 1 terms of η Σ (I − ηA)ʲ b.

    x ← x + η(b − A x), k times from x = ηb (or `guess`).
    """
    start = jax.tree.map(lambda b: (step_size * b).astype(b.dtype), right) if guess is None else guess

    def iterate(_: int, x: Params) -> Params:
        return trees.axpy(step_size, trees.axpy(-1.0, product(x), right), x)

    return jax.lax.fori_loop(0, iterations, iterate, start)


class _Conjugate(NamedTuple):
    """What conjugate gradient carries from one iteration to the next."""

    solution: Params
    residual: Params
    direction: Params
    squared: Array
    """‖residual‖²."""
    steepest: Array
    """The largest curvature dᵀAd/dᵀd met so far."""
    done: Array
    going: Array


def _implicit(
    solve: Solver, damping: float, warm_start: bool, max_norm: float | None, average_specific: float
) -> Method:
    check_decay(average_specific)

    def init(part: Params) -> ImplicitState:
        zeros = jax.tree.map(jnp.zeros_like, part)
        return ImplicitState(trees.wide(zeros) if average_specific else None, zeros if warm_start else None)

    def update(problem: Problem, state: ImplicitState) -> MethodUpdate:
        rows = problem.quadratic()
        loss, specific = problem.specific_gradient(trees.after(problem.params, rows.gradient))
        if average_specific:
            remembered = trees.average(specific, state.specific_gradient, average_specific)
            state, specific = state._replace(specific_gradient=remembered), trees.like(remembered, specific)

        def product(direction: Params) -> Params:
            return trees.axpy(damping, direction, rows.hessian_product(direction))

        probe = solve(product, jax.tree.map(jnp.negative, specific), state.probe)
        if max_norm is not None:
            probe = trees.bounded(probe, max_norm)
        if warm_start:
            state = state._replace(probe=probe)
        return MethodUpdate(rows.losses, rows.aux, rows.gradient, rows.alignments(probe), loss, state)

    return Method(init, update)


def _check(name: str, iterations: int, damping: float, max_norm: float | None) -> None:
    if iterations < 1:
        raise UserError(f"{name}(iterations={iterations}) must be at least 1.")
    if damping < 0:
        raise UserError(f"{name}(damping={damping}) must not be negative: 0 leaves the Hessian as it is.")
    if max_norm is not None and max_norm <= 0:
        raise UserError(f"{name}(max_norm={max_norm}) must be positive, or None for no bound.")
