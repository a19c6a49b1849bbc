"""A training state as a flat table of arrays: what checkpoints store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.types import UserError

Table = dict[str, Any]


def to_table(state: Any) -> Table:
    """Return `{path of the leaf: array}`.

    Typed keys become their integers, numbers become 0-d numpy arrays.

    Empty arrays are left out (there is nothing to store).
    """
    table = {}
    for path, leaf in _leaves(state):
        array = _storable(leaf)
        if array.size:
            table[path] = array
    return table


def restore_template(template: Any) -> Table:
    """Return what tells Orbax how to restore each leaf.

    As numpy, or with the sharding of the template.
    """
    table = {}
    for path, leaf in _leaves(template):
        shape, dtype = _stored_type(leaf)
        if 0 in shape:
            continue
        sharding = _committed_sharding(leaf)
        if sharding is None:
            table[path] = np.empty(shape, dtype)
        else:
            table[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return table


def from_table(table: Mapping[str, Any], template: Any) -> Any:
    """Return the arrays of `table` in the tree of `template`.

    Each is of the template leaf's kind.
    """
    restored = [_restored(table.get(path), leaf) for path, leaf in _leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def check_fits(template: Any, stored: Mapping[str, Any], where: str) -> None:
    """Compare the template with the stored leaves (anything with `shape` and `dtype`).

    Raises:
        UserError: names the first leaf that differs.
    """
    expected = {}
    for path, leaf in _leaves(template):
        shape, dtype = _stored_type(leaf)
        if 0 not in shape:
            expected[path] = _describe(shape, dtype)
    found = {path: _describe(leaf.shape, leaf.dtype) for path, leaf in stored.items()}
    for path in [*expected, *(path for path in found if path not in expected)]:
        if expected.get(path) != found.get(path):
            raise UserError(
                f"The {where} does not fit this run: `state{path}` is {found.get(path, 'missing')} there and "
                f"{expected.get(path, 'missing')} here; use the settings that it was saved with, "
                "or another run directory."
            )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    found = []
    # `key_impl` refuses a ShapeDtypeStruct but accepts the tracer made from it.
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _storable(leaf: Any) -> jax.Array | np.ndarray:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)  # a copy: the caller may change its array while the save is in progress
    # With several processes, an array that lives in this one only is the same in all: one of them writes it.
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        return np.array(leaf)
    return leaf


def _stored_type(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return data.shape, data.dtype
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), np.dtype(leaf.dtype)
    array = np.asarray(leaf)
    return array.shape, array.dtype


def _committed_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.Array):
        local = jax.process_count() > 1 and leaf.is_fully_addressable
        if local or not leaf.committed:
            return None
        return (jax.random.key_data(leaf) if _is_key(leaf) else leaf).sharding
    return getattr(leaf, "sharding", None)


def _restored(array: Any, leaf: Any) -> Any:
    if array is None:
        array = np.zeros(*_stored_type(leaf))
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_impl(leaf))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        # A copy, for jax must never donate memory that numpy owns.
        return array if isinstance(array, jax.Array) else jnp.array(array, leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return np.asarray(array)
    return type(leaf)(array.item())


def _describe(shape: Any, dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
