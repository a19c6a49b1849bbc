"""Arithmetic on parameter trees, and the choice of a part of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import Array, Params, Shared, UserError


def dot(a: Params, b: Params) -> Array:
    """Inner product of two trees of one structure, accumulated in float32 or wider."""
    products = jax.tree.map(lambda x, y: jnp.sum(widen(x) * widen(y)), a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def norm(a: Params) -> Array:
    """Euclidean norm of a tree."""
    return jnp.sqrt(dot(a, a))


def bounded(a: Params, max_norm: float) -> Params:
    """The tree, scaled down to `max_norm` if its norm is larger."""
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm(a), 1e-20))
    return jax.tree.map(lambda x: (scale * x).astype(x.dtype), a)


def axpy(scale: Any, x: Params, y: Params) -> Params:
    """`y + scale·x`, leaf by leaf, in the types of `y`."""
    return jax.tree.map(lambda xi, yi: (yi + scale * xi).astype(yi.dtype), x, y)


def average(new: Params, old: Params, decay: float) -> Params:
    """`decay·old + (1 − decay)·new`, leaf by leaf, in the types of `old`; `new` where it has no mean (counters, random keys).

    `old` begins as `wide(…)`: in bfloat16 a decay of 0.999 is 1, and the average would never move.
    """

    def leaf(x: Array, y: Array) -> Array:
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return x
        return (decay * y + (1.0 - decay) * x.astype(y.dtype)).astype(y.dtype)

    return jax.tree.map(leaf, new, old)


def wide(tree: Params) -> Params:
    """The tree with its real numbers in at least float32."""
    return jax.tree.map(lambda x: widen(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def like(tree: Params, template: Params) -> Params:
    """The tree in the types of `template`."""
    # Random keys have no `astype` outside jit, and need none.
    return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), tree, template)


def is_finite(tree: Params) -> Array:
    """Whether no number of the tree is NaN or infinite, a bool scalar."""
    return _all(jnp.isfinite(x) for x in jax.tree.leaves(tree))


def stays_finite(new: Params, old: Params) -> Array:
    """Whether no number that is finite in `old` is NaN or infinite in `new`, a bool scalar.

    What was infinite before may stay so: optimizers begin with an infinity where they look for a minimum.
    """
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    changed = ((x, y) for x, y in pairs if x is not y and jnp.issubdtype(x.dtype, jnp.inexact))
    return _all(jnp.isfinite(x) | ~jnp.isfinite(y) for x, y in changed)


def _all(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.logical_and, map(jnp.all, arrays), jnp.asarray(True))


def choose(condition: Array, x: Params, y: Params) -> Params:
    """`x` where the scalar condition holds, else `y`."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), x, y)


def in_structure(tree: Any, template: Any) -> Any:
    """The tree with the containers of `template`, if both have the same leaves (a dict as a FrozenDict); else as it is."""
    structure = jax.tree.structure(template)
    if jax.tree.structure(tree) == structure:
        return tree
    paths, wanted = (
        [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (tree, template)
    )
    return jax.tree.unflatten(structure, jax.tree.leaves(tree)) if paths == wanted else tree


def as_before(new: Any, old: Any) -> Any:
    """`new` in the tree and the types of `old`: a state whose types change is compiled for twice, and no loop carries it."""
    new = in_structure(new, old)
    return like(new, old) if jax.tree.structure(new) == jax.tree.structure(old) else new


def widen(x: Array) -> Array:
    """`x` in at least float32, so that sums over many parameters keep their digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def after(value: Any, *dependencies: Any) -> Any:
    """`value`, available to the compiler only once `dependencies` are computed.

    Two independent backward passes in one program are scheduled into each other on CPU and then take almost twice as long
    as one after the other; optimization barriers are dropped before scheduling there, so the order is a data dependence.
    The value is the same whatever the dependencies hold, NaN included.
    """
    touched = sum((_first(x) for x in jax.tree.leaves(dependencies) if x.size), start=jnp.zeros(()))
    touched = jnp.where(jnp.isnan(touched), 0.0, touched)
    return jax.tree.map(lambda x: jnp.where(touched == touched, x, jnp.nan).astype(x.dtype), value)


def _first(x: Array) -> Array:
    """The first element. A slice, as flattening would gather an array that is split over devices."""
    return jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)


def map_rows(function: Callable[[Any], Any], batch: Any, shared: Callable[[Shared], Any] = lambda node: node) -> Any:
    """Apply a function to every array with rows of a batch.

    Its `Shared` nodes are given to `shared`, and left as they are by default.
    """
    return jax.tree.map(lambda x: shared(x) if _is_shared(x) else function(x), batch, is_leaf=_is_shared)


def without_shared(batch: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Split a batch into its rows and a function that adds what is `Shared`.

    Returns:
      The batch with None, an empty subtree, instead of each `Shared` node; and (such a batch of any rows) -> the whole batch.
    """

    def join(rows: Any) -> Any:
        return jax.tree.map(lambda x, row: x if _is_shared(x) else row, batch, rows, is_leaf=_is_shared)

    return map_rows(lambda x: x, batch, lambda _: None), join


def _is_shared(x: Any) -> bool:
    return isinstance(x, Shared)


def take(batch: Any, indices: Array) -> Any:
    """The rows `indices` of every array of a batch; `Shared` nodes are left whole."""
    return map_rows(lambda x: jnp.take(x, indices, axis=0), batch)


def num_rows(batch: Any) -> int:
    """The length of the leading axis that all arrays of a batch share, but for those in `Shared` nodes.

    Raises:
      UserError: if the batch has no arrays or no rows, or holds a scalar, or two of its arrays disagree.
    """
    rows, _ = without_shared(batch)
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(rows)}
    counts: dict[str, Any] = {name: shape[0] if shape else "a scalar" for name, shape in shapes.items()}
    if len(set(counts.values())) != 1 or "a scalar" in counts.values():
        found = ", ".join(f"{name or 'array'}: {n}" for name, n in counts.items()) or "no arrays"
        raise UserError(
            f"A batch must be a tree of arrays with one common leading axis, but found {found}: make them equal, or mark what "
            "belongs to no row as bilevel.Shared."
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise UserError(f"A batch has no rows (shapes: {', '.join(map(str, shapes.values()))}): give at least one.")
    return count


class Subset(NamedTuple):
    """The part of the parameters that the probe lives in; leaves outside are None, which is an empty subtree."""

    restrict: Callable[[Params], Params]
    """Full tree -> the part."""
    merge: Callable[[Params, Params], Params]
    """(part, full tree) -> the full tree with the part's leaves replaced."""
    embed: Callable[[Params, Params], Params]
    """(part, full tree) -> the part with zeros elsewhere."""
    is_everything: bool


def make_subset(param_filter: Callable[[str], bool] | None, params: Params) -> Subset:
    """Chooses the leaves whose path, as in `"layer_3/mlp/kernel"`, satisfies `param_filter`; None chooses all.

    Raises:
      UserError: if no leaf satisfies it.
    """
    if param_filter is None:
        return Subset(lambda tree: tree, lambda part, _: part, lambda part, _: part, True)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    chosen = [param_filter(path) for path in paths]
    if not any(chosen):
        raise UserError(
            f"param_filter accepts none of the {len(paths)} parameters ({', '.join(paths[:3])}, …): "
            "let it accept the paths that the probe should cover."
        )
    structure = jax.tree.structure(params)

    def restrict(tree: Params) -> Params:
        leaves = structure.flatten_up_to(tree)
        return structure.unflatten([x if keep else None for x, keep in zip(leaves, chosen, strict=True)])

    def fill(part: Params, tree: Params, other: Callable[[Array], Array]) -> Params:
        inner, outer = structure.flatten_up_to(part), structure.flatten_up_to(tree)
        return structure.unflatten([x if keep else other(y) for x, y, keep in zip(inner, outer, chosen, strict=True)])

    return Subset(
        restrict,
        lambda part, tree: fill(part, tree, lambda y: y),
        lambda part, tree: fill(part, tree, jnp.zeros_like),
        False,
    )
