"""A function f(x, y) split into a part that needs only y, and the rest.

Probes live in a part of θ, such as the last block of a network. What lies below it gives the same at every value of the part, so
it is evaluated once; losses at a moved part, or their derivatives there, start from what it gave. XLA for GPUs merges the
two forward passes by itself. XLA for CPU does not: it simplifies the one that a backward pass belongs to in another way than
one alone, and then sees two different computations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bilevel.types import Array


class Split(NamedTuple):
    """`function(x, y)` as `above(x, below(y))`."""

    below: Callable[[Any], list[Array]]
    """y -> what depends on y alone and is needed above: activations, most of all."""
    above: Callable[[Any, list[Array]], Any]
    """(x, what `below` gave) -> the value of the function."""


def split(function: Callable[[Any, Any], Any], x: Any, y: Any) -> Split:
    """Split f(x, y) into a part that needs only y, computed once, and the rest.

    The cut goes between the operations that JAX traces, not through them: a function that is one `jax.jit`, or one `scan`
    over all layers, with x among its inputs lies above as a whole, and nothing is saved. So do operations with effects,
    collectives over a mapped axis among them, and all that follows from them. What depends on neither argument (masks, draws
    of dropout) belongs to both halves, as it is cheaper made again than kept. Both halves can be differentiated.

    Args:
      function: a pure function that JAX can trace; it may close over arrays, also over those of a trace under way. Rules of
        `jax.custom_vjp` within it must take what they use as arguments: they are called when values that they close over
        are gone.
      x: tree of arrays.
      y: tree of arrays.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(x, y)
    jaxpr, structure = getattr(closed, "jaxpr", closed), jax.tree.structure(shape)
    own = len(jax.tree.leaves(x))
    first, second = jaxpr.invars[:own], jaxpr.invars[own:]
    on_x, on_y, lower, upper = set(first), set(second), [], []
    for equation in jaxpr.eqns:
        inputs = set(_variables(equation.invars))
        # Operations with effects stay in their order, and have them at every evaluation.
        if equation.effects or inputs & on_x:
            on_x.update(equation.outvars)
            upper.append(equation)
        else:
            lower.append(equation)
            if inputs & on_y:
                on_y.update(equation.outvars)
            else:
                upper.append(equation)
    used = (v for atoms in (*(e.invars for e in upper), jaxpr.outvars) for v in _variables(atoms))
    crossing = [v for v in dict.fromkeys(used) if v in on_y and v not in on_x]
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def below(y: Any) -> list[Array]:
        return _evaluated(lower, constants | dict(zip(second, jax.tree.leaves(y), strict=True)), crossing)

    def above(x: Any, known: list[Array]) -> Any:
        given = dict(zip([*first, *crossing], [*jax.tree.leaves(x), *known], strict=True))
        return structure.unflatten(_evaluated(upper, constants | given, jaxpr.outvars))

    return Split(below, above)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _evaluated(equations: Iterable[Any], values: dict[Any, Array], outputs: Iterable[Any]) -> list[Array]:
    """The values of the outputs; those of the equations are added to `values`."""

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in equations:
        inputs, params = map(read, equation.invars), equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager, _named(str(equation.source_info.name_stack)):
            found = equation.primitive.bind(*inputs, **params)
        found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in outputs]


def _named(scope: str) -> contextlib.AbstractContextManager[Any]:
    """The names of modules, for profiles (the lines of source that they stood in are lost)."""
    return jax.named_scope(scope) if scope else contextlib.nullcontext()
