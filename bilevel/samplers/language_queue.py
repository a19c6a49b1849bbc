"""A round of pairs in minibatches of one language each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import Array


class Queue(NamedTuple):
    """The minibatches of a round."""

    rows: Array
    """int32 `[M, b]`: row numbers; −1 at places without a row, which are never first."""
    language: Array
    """int32 `[M]`: the language of each minibatch."""
    length: Array
    """int32 scalar: the minibatches that hold rows, at most M; those behind are empty."""
    place: Array
    """int32 scalar: minibatches taken."""


def most_batches(pairs: int, languages: int, batch_size: int) -> int:
    """Return M, the most minibatches that K pairs of n languages can make: each language may end in one that is not full."""
    started = min(pairs, languages)
    return (pairs + started * (batch_size - 1)) // batch_size


def empty_queue(pairs: int, languages: int, batch_size: int) -> Queue:
    """Return a queue that has been used up."""
    zero, most = jnp.zeros((), jnp.int32), most_batches(pairs, languages, batch_size)
    return Queue(jnp.full((most, batch_size), -1, jnp.int32), jnp.zeros(most, jnp.int32), zero, jnp.copy(zero))


def sorted_queue(key: Array, rows: Array, languages: Array, count: int, batch_size: int) -> Queue:
    """Sort pairs into minibatches of one language.

    The last minibatch of a language may have places without a row. The minibatches come in random order (ours), so that no
    language's running gradient is older than the others'.

    Args:
      key: a typed key.
      rows: int32 `[K]`, row numbers in random order.
      languages: int32 `[K]`.
      count: n, the number of languages.
      batch_size: b.
    """
    pairs, most = rows.shape[0], most_batches(rows.shape[0], count, batch_size)
    order = jnp.argsort(languages, stable=True)
    found = languages[order]
    counts = jnp.zeros(count, jnp.int32).at[languages].add(1)
    batches = -(-counts // batch_size)
    ends = jnp.cumsum(batches)
    inside = jnp.arange(pairs) - (jnp.cumsum(counts) - counts)[found]
    places = (ends - batches)[found] * batch_size + inside
    filled = jnp.full(most * batch_size, -1, jnp.int32).at[places].set(rows[order].astype(jnp.int32))
    numbers = jnp.arange(most)
    language = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), count - 1).astype(jnp.int32)
    length = ends[-1].astype(jnp.int32)
    mixed = jnp.argsort(jnp.where(numbers < length, jax.random.uniform(key, (most,)), 2.0))
    return Queue(filled.reshape(most, batch_size)[mixed], language[mixed], length, jnp.zeros((), jnp.int32))
