"""What a step needs of an optimizer: updates from gradients alone, and a derivative to look ahead through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from bilevel.types import Array, Params, UserError

_GATHERING = (optax.MultiStepsState, optax.ApplyEvery)
_TRIED = 16
"""α-steps that an optimizer which gathers gradients is tried for."""


def check_parameters(params: Params, name: str) -> None:
    """Reject parameters that have no gradient.

    Args:
      params: a tree of arrays or their shapes.
      name: what they are, for the message.

    Raises:
      UserError: naming the first leaf that does not hold real numbers.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(kind, jnp.inexact):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{name}: the leaf {where!r} is {kind}, and only floating-point parameters have a gradient: keep counters and "
                "random keys in the model state."
            )


def check_optimizer(optimizer: optax.GradientTransformation, params: Params, name: str) -> None:
    """Reject an optimizer whose update needs more than a gradient, its state and the parameters.

    Args:
      optimizer: any optax transformation.
      params: what it is for, or their shapes.
      name: which optimizer it is, for the message.

    Raises:
      UserError: with what optax says is missing.
    """
    try:
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot make an update of a gradient, its state and the parameters, which is all that a step gives it "
            f"({' '.join(str(error).split())}): choose an optimizer that needs no value=, grad=, value_fn= or the like."
        ) from error
    except Exception:
        return  # such as for a mapped axis, which is known inside of the step alone


def warn_of_derivative_zero(
    optimizer: optax.GradientTransformation, params: Params, update_every: int, chooses_weights: bool
) -> None:
    """Warn of an optimizer through which a method that looks ahead learns nothing.

    Args:
      optimizer: that of θ.
      params: θ, or its shapes.
      update_every: α-steps are 0, k, 2k, …
      chooses_weights: the method chooses the weights of every θ-update, so that all steps count.
    """
    try:
        depends, moves = _has_derivative(optimizer, params), None
        if depends and _gathers(optimizer, params):
            moves = _moving(optimizer, params, _TRIED * update_every)[::update_every]
    except Exception:
        return  # such as for a mapped axis, or masks of one shape; `train` sees alignments of 0 all the same
    if not depends:
        warnings.warn(
            "The derivative of θ's optimizer is 0 everywhere (that of a sign is: lion, sign_sgd, rprop), and the method looks "
            "ahead through its update: it will learn nothing. Choose another optimizer, or a method that does not look ahead "
            "(soba, penalty, anograd without through_optimizer).",
            stacklevel=4,
        )
    elif moves is not None and not (all(moves) if chooses_weights else any(moves)):
        which = "some steps" if chooses_weights else f"every step that is due for α (update_every={update_every})"
        warnings.warn(
            f"θ's optimizer gathers gradients, and on {which} it leaves θ where it is; the method looks ahead through its "
            "update and learns nothing there. Omit MultiSteps or apply_every and give make_step(micro_batches=…) or a larger "
            "batch_size, or choose an update_every that has no divisor in common with the steps that are gathered.",
            stacklevel=4,
        )


def _pulled(optimizer: optax.GradientTransformation, gradient: Params, state: Any, params: Params) -> Params:
    """(∂U/∂g)ᵀ 1."""
    updates, pullback = jax.vjp(lambda g: optimizer.update(g, state, params)[0], gradient)
    return pullback(jax.tree.map(jnp.ones_like, updates))[0]


def _has_derivative(optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Whether the update has a derivative that is not 0 by construction, as that of a sign is (or does not see the gradient)."""

    def updated(gradient: Params, params: Params) -> Params:
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    def pulled(cotangent: Params, params: Params) -> Params:
        return jax.vjp(lambda gradient: updated(gradient, params), params)[1](cotangent)[0]

    cotangent = jax.eval_shape(updated, params, params)
    return _reaches(pulled, cotangent, params) or not _reaches(updated, params, params)


def _reaches(function: Callable[[Any, Any], Any], first: Any, second: Any) -> bool:
    """Whether anything that the function returns depends on its first argument."""
    closed = jax.make_jaxpr(function)(first, second)
    jaxpr = getattr(closed, "jaxpr", closed)
    reached = set(jaxpr.invars[: len(jax.tree.leaves(first))])
    for equation in jaxpr.eqns:
        if not reached.isdisjoint(_variables(equation.invars)):
            reached.update(equation.outvars)
    return not reached.isdisjoint(_variables(jaxpr.outvars))


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _gathers(optimizer: optax.GradientTransformation, params: Params) -> bool:
    is_gathering: Callable[[Any], bool] = lambda node: isinstance(node, _GATHERING)  # noqa: E731
    return any(map(is_gathering, jax.tree.leaves(jax.eval_shape(optimizer.init, params), is_leaf=is_gathering)))


def _moving(optimizer: optax.GradientTransformation, params: Params, steps: int) -> list[bool]:
    """Whether the update depends on the gradient, step by step, tried on parameters of a few numbers."""

    def step(carry: tuple[Any, Array], key: Array) -> tuple[tuple[Any, Array], Array]:
        state, small = carry
        gradient = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), small)
        found = jax.tree.leaves(_pulled(optimizer, gradient, state, small))
        moved = jnp.stack([jnp.any(x != 0) for x in found]).any()
        return (optimizer.update(gradient, state, small)[1], small), moved

    with jax.ensure_compile_time_eval():
        small = jax.tree.map(lambda x: jnp.ones(tuple(min(n, 2) for n in jnp.shape(x)), jnp.result_type(x)), params)
        keys = jax.random.split(jax.random.key(0), steps)
        _, moved = jax.jit(lambda: jax.lax.scan(step, (optimizer.init(small), small), keys))()
        return [bool(x) for x in moved]
