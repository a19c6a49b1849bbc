"""How often a sampler drew which rows and classes (RLSampler, section 6.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import Array


class Frequencies(NamedTuple):
    """The spread of how often rows (or classes) were drawn, float32 scalars: figure 3 (a, b)."""

    least: Array
    percentile_10: Array
    median: Array
    percentile_90: Array
    most: Array
    least_deviation: Array
    """least / mean − 1: the mean is what uniform draws give to each."""
    most_deviation: Array
    """most / mean − 1."""


def row_counts(sequence: Any, num_rows: int) -> Array:
    """Count how often each row was drawn.

    Args:
      sequence: integers of any shape, such as `[steps, b]`; those outside 0…N−1 are left out.
      num_rows: N.

    Returns:
      int32 `[N]`.
    """
    rows = jnp.ravel(jnp.asarray(sequence))
    known = (rows >= 0) & (rows < num_rows)
    return jnp.zeros(num_rows, jnp.int32).at[jnp.where(known, rows, 0)].add(known.astype(jnp.int32))


def class_counts(counts: Array, labels: Any, num_classes: int) -> Array:
    """Count how often each class was drawn.

    Args:
      counts: int32 `[N]`, from `row_counts`.
      labels: integers `[N]`, the class of each row.
      num_classes: C.

    Returns:
      int32 `[C]`.
    """
    return jax.ops.segment_sum(counts, jnp.asarray(labels), num_classes)


def frequencies(counts: Array) -> Frequencies:
    """Compute the numbers of figure 3 (a, b) for counts of rows or classes, int32 `[n]`."""
    values = counts.astype(jnp.float32)
    low, median, high = jnp.percentile(values, jnp.asarray([10.0, 50.0, 90.0]))
    least, most = jnp.min(values), jnp.max(values)  # percentiles would round them
    mean = jnp.maximum(jnp.mean(values), jnp.finfo(jnp.float32).tiny)
    return Frequencies(least, low, median, high, most, least / mean - 1, most / mean - 1)
