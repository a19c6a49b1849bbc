"""The derivative of an optimizer's update where reverse mode has none.

Adam takes the root of a second moment, which has no derivative at 0; RAdam takes one of a negative number in the branch that its
first steps do not use. Reverse mode multiplies the NaN or infinity found there by a cotangent of 0, and the NaN that follows
goes on to whatever comes before: a mask, clipping by the norm of all gradients. A cotangent of 0 says that nothing depends on
that operation, so the product is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevel.types import Array

HARMLESS = {
    "abs", "add", "add_any", "broadcast_in_dim", "ceil", "clamp", "concatenate", "cond", "convert_element_type", "copy",
    "dynamic_slice", "dynamic_update_slice", "floor", "gather", "jit", "max", "min", "neg", "pad", "pjit", "reduce_max",
    "reduce_min", "reduce_sum", "reshape", "round", "select_n", "sign", "slice", "split", "squeeze", "sub", "transpose",
}  # fmt: skip
"""Operations whose derivatives are finite wherever they are evaluated, and those that are looked into."""


def without_singularities(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make the same function, with a pullback in which a cotangent that is not finite becomes 0.

    So it is behind each operation, before it is added to others. Values are those of the function. Operations inside of `scan`
    and `while_loop` are not looked into.

    Args:
      function: one tree of arrays -> a tree of arrays; it may close over arrays, also over those of a trace under way.
    """

    def evaluate(argument: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(argument)
        found = _evaluated(closed, jax.tree.leaves(argument))
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return evaluate


@jax.custom_vjp
def _guarded(x: Array) -> Array:
    return x


def _guarded_forward(x: Array) -> tuple[Array, None]:
    return x, None


def _guarded_backward(_: None, cotangent: Array) -> tuple[Array]:
    return (jnp.where(jnp.isfinite(cotangent), cotangent, 0).astype(cotangent.dtype),)


_guarded.defvjp(_guarded_forward, _guarded_backward)


def _evaluated(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    jaxpr = getattr(closed, "jaxpr", closed)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    # Only what depends on the arguments has a cotangent.
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        on = [not isinstance(atom, core.Literal) and atom in reached for atom in equation.invars]
        reached.update(equation.outvars if any(on) else ())
        if equation.primitive.name not in HARMLESS:
            inputs = [
                _guarded(x) if o and jnp.issubdtype(x.dtype, jnp.inexact) else x
                for x, o in zip(inputs, on, strict=True)
            ]
        with equation.ctx.manager:
            values.update(zip(equation.outvars, _applied(equation, inputs), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _applied(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        return _evaluated(params["jaxpr"], inputs)
    if name == "cond":
        branches = [lambda *operands, branch=branch: _evaluated(branch, operands) for branch in params["branches"]]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
    found = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return found if equation.primitive.multiple_results else [found]
