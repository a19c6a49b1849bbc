"""A function of two arguments cut in two: what does not depend on the first one, and the rest.

Probes live in a part of θ, such as the last block of a network. What lies below it gives the same at every value of the part, so
it is evaluated once; losses at a moved part, or their derivatives there, start from what it gave. XLA for GPUs merges the
two forward passes by itself. XLA for CPU does not: it simplifies the one that a backward pass belongs to in another way than
one alone, and then sees two different computations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevel.types import Array


class Known(NamedTuple):
    """What the evaluation at another first argument starts from."""

    real: list[Array]
    """Activations (and whatever else has a derivative)."""
    other: list[Array]
    """Whole numbers, booleans and random keys."""


class Split(NamedTuple):
    """`function(x, y)` as `above(x, below(y))`."""

    below: Callable[[Any], Known]
    """y -> all that x has no part in."""
    above: Callable[[Any, Known], Any]
    """(x, what `below` gave) -> the value of the function."""


def split(function: Callable[[Any, Any], Any], x: Any, y: Any) -> Split:
    """Cuts a function of two trees of arrays at these shapes and types.

    The cut goes between the operations that JAX traces, not through them: a function that is one `jax.jit`, or one `scan`
    over all layers, with x among its inputs lies above as a whole, and nothing is saved. Both halves can be differentiated.

    Args:
      function: a pure function that JAX can trace; it may close over arrays, also over those of a trace under way.
      x: tree of arrays.
      y: tree of arrays.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(x, y)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)
    own = len(jax.tree.leaves(x))
    first, second = jaxpr.invars[:own], jaxpr.invars[own:]
    dependent, lower, upper = set(first), [], []
    for equation in jaxpr.eqns:
        if equation.effects or any(v in dependent for v in _variables(equation.invars)):
            dependent.update(equation.outvars)
            upper.append(equation)
        else:
            lower.append(equation)
    used = (v for atoms in (*(e.invars for e in upper), jaxpr.outvars) for v in _variables(atoms))
    known = [v for v in dict.fromkeys(used) if v not in dependent]
    real = [v for v in known if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    other = [v for v in known if not jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def below(y: Any) -> Known:
        values = dict(zip([*jaxpr.constvars, *second], [*closed.consts, *jax.tree.leaves(y)], strict=True))
        return Known(_evaluated(lower, values, real), _evaluated([], values, other))

    def above(x: Any, known: Known) -> Any:
        inputs = [*jax.tree.leaves(x), *known.real, *known.other]
        values = dict(zip([*first, *real, *other], inputs, strict=True))
        return structure.unflatten(_evaluated(upper, values, jaxpr.outvars))

    return Split(below, above)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _evaluated(equations: Iterable[Any], values: dict[Any, Array], outputs: Iterable[Any]) -> list[Array]:
    """The values of the outputs; those of the equations are added to `values`."""

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in equations:
        inputs, params = map(read, equation.invars), equation.primitive.get_bind_params(equation.params)
        # The names of modules, for profiles.
        with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
            found = equation.primitive.bind(*inputs, **params)
        found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in outputs]
