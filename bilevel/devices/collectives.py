"""Sums and means over a mapped axis, and where arrays lie on a mesh; without an axis or a mesh nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def axis_size(axis_name: str | None) -> int:
    """Number of devices along the mapped axis, 1 without one."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def fold_index(key: jax.Array, axis_name: str | None) -> jax.Array:
    """A key of this device's own."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def sum_over(tree: Any, axis_name: str | None) -> Any:
    """Sum over the mapped axis, leaf by leaf."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mean_over(tree: Any, axis_name: str | None) -> Any:
    """Mean over the mapped axis, leaf by leaf; of what has no mean (counters, random keys) the first device's."""
    if axis_name is None:
        return tree

    def leaf(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.lax.pmean(x, axis_name)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        first = jnp.where(jax.lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x))
        return jax.lax.psum(first, axis_name).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def spread(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated values as differing by device, so that differentiation leaves the summing to us."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), tree)


def spread_rows(batch: Any, mesh: Mesh | None) -> Any:
    """The batch with its rows spread over all devices of the mesh; under plain `jit`."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def gather(tree: Any, mesh: Mesh | None, chosen: Callable[[str], bool] | None = None) -> Any:
    """The arrays whole on every device of the mesh; under plain `jit`.

    Args:
      tree: arrays.
      mesh: the devices; None changes nothing.
      chosen: path ("block_1/mlp/kernel") -> whether that array is gathered; None: all of them.
    """
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        if chosen is not None and not chosen(jax.tree_util.keystr(path, simple=True, separator="/")):
            return x
        return jax.lax.with_sharding_constraint(x, whole)

    return jax.tree_util.tree_map_with_path(leaf, tree)
