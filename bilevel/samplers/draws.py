"""Draws from many categorical distributions over many rows, one from each."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.types import Array


def draw_each(key: Array, weights: Array) -> Array:
    """Draw one row from each of k distributions over N rows.

    By inversion in two stages: first a block of rows, then a row of it.

    That takes 2k random numbers, where `jax.random.categorical` takes k·N, most of the time of a draw on a CPU. Blocks of √N
    rows keep the sums short, so that a row's chance is its weight to about √N roundings.

    Args:
      key: a typed key.
      weights: `[k, N]`, not negative and with a positive sum in each line, which need not be 1.

    Returns:
      int32 `[k]`.
    """
    count, rows = weights.shape
    size = math.isqrt(max(rows - 1, 0)) + 1
    weights = trees.widen(weights)
    padded = jnp.pad(weights, ((0, 0), (0, -rows % size)))
    for_blocks, for_rows = jax.random.split(key)
    block = _invert(for_blocks, jnp.sum(padded.reshape(count, -1, size), axis=-1))
    members = block[:, None] * size + jnp.arange(size)
    # Taken from what was not padded, so that the padded copy is never made.
    taken = jnp.take_along_axis(weights, jnp.minimum(members, rows - 1), axis=1)
    place = _invert(for_rows, jnp.where(members < rows, taken, 0.0))
    return (block * size + place).astype(jnp.int32)


def _invert(key: Array, weights: Array) -> Array:
    """Of `[k, m]`, one place of each line: the first whose cumulative weight is above a uniform share of all."""
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    target = jax.random.uniform(key, total.shape, weights.dtype) * total
    # The last bound keeps a line's end, with no weight in it, out of reach of rounding.
    return jnp.argmax((cumulative > target) | (cumulative >= total), axis=-1)
