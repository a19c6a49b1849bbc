"""Beam search for any encoder–decoder, as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.nn.translation.base import END, PAD, Decoding, EncoderDecoder
from bilevel.types import Array, Batch, Params, UserError

Penalty = Callable[[Array], Array]
"""Number of pieces, END included, float32 -> what a hypothesis's log-probability is divided by; it must not fall."""


def gnmt(alpha: float) -> Penalty:
    """Return the length penalty ((5 + n)/6)^α (Wu et al. 2016, "Google's neural machine translation system", equation 14)."""
    return lambda length: ((5.0 + length) / 6.0) ** alpha


def by_length(length: Array) -> Array:
    """Return the number of pieces: hypotheses are compared by their mean log-probability."""
    return length


class Found(NamedTuple):
    """The best hypothesis of each row."""

    pieces: Array
    """int32 `[b, T]`: with END, where it ended, and PAD behind."""
    length: Array
    """int32 `[b]`: pieces, END included."""
    score: Array
    """float32 `[b]`: its log-probability over the length penalty."""


class _Beam(NamedTuple):
    position: Array
    """Pieces that the live hypotheses have."""
    pieces: Array
    """int32 `[b, k, T]`."""
    totals: Array
    """float32 `[b, k]`: their log-probabilities; -inf: no hypothesis."""
    moving: Any
    """Of the decoder, leading axes b, k."""
    best: Found
    """Of those that ended; score -inf: none did."""
    ended: Array
    """int32 `[b]`: how many did."""


def beam_search(
    network: EncoderDecoder, params: Params, batch: Batch, *, beam: int, most: int, penalty: Penalty = by_length
) -> Found:
    """Return the best translation that a search with `beam` hypotheses a row finds.

    In each step every live hypothesis is extended by each piece. Of the `beam` most probable extensions, those by END are
    hypotheses that ended; the `beam` most probable others live on. The search of a row is over when `beam` hypotheses ended, or
    none that lives can still become the best. A row of which none ended within `most` pieces gives the most probable live one.
    A beam of 1 is greedy search.

    Args:
      network: the encoder–decoder.
      params: its parameters.
      batch: sources; targets are not read.
      beam: k, at least 1.
      most: T, the most pieces of a translation, END included.
      penalty: of the length, for comparing hypotheses that ended.

    Raises:
      UserError: for a beam or a length below 1.
    """
    if beam < 1 or most < 1:
        raise UserError(f"A beam search needs a beam and a length of at least 1, not {beam} and {most}.")
    rows = batch["source"].shape[0]
    fixed, begun = network.begin(params, batch, most)
    moving = jax.tree.map(lambda x: jnp.repeat(x, beam, axis=1), begun)
    none = Found(jnp.full((rows, most), PAD), jnp.zeros((rows,), jnp.int32), jnp.full((rows,), -jnp.inf, jnp.float32))
    # All hypotheses are alike at first: only one of them counts.
    first = jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf), (rows, beam)).astype(jnp.float32)
    start = _Beam(jnp.int32(0), jnp.full((rows, beam, most), PAD), first, moving, none, jnp.zeros((rows,), jnp.int32))
    largest = penalty(jnp.float32(most))

    def goes_on(state: _Beam) -> Array:
        return (state.position < most) & jnp.any(state.totals > -jnp.inf)

    def step(state: _Beam) -> _Beam:
        last = state.pieces[:, :, jnp.maximum(state.position - 1, 0)]  # PAD at position 0
        logits, moving = network.extend(params, Decoding(fixed, state.moving), last, state.position)
        logits = logits.astype(jnp.float32)
        begun = state.totals - jax.nn.logsumexp(logits, axis=-1)
        extended = (begun[:, :, None] + logits).at[:, :, PAD].set(-jnp.inf).reshape(rows, -1)
        vocabulary = logits.shape[-1]
        # Each hypothesis can end once: of twice as many extensions as live on, enough go on. Without the barrier XLA merges
        # the slices below into this, does not see a top-k any more, and sorts all k · V of them.
        totals, chosen = jax.lax.optimization_barrier(jax.lax.top_k(extended, min(2 * beam, extended.shape[1])))
        origin, piece = chosen // vocabulary, chosen % vocabulary
        pieces = jnp.take_along_axis(state.pieces, origin[:, :, None], axis=1).at[:, :, state.position].set(piece)
        ends, length = piece == END, state.position + 1
        ending = jnp.where(ends[:, :beam], totals[:, :beam], -jnp.inf)
        ended = state.ended + (ending > -jnp.inf).sum(axis=1)
        best = _better(state.best, pieces[:, :beam], ending / penalty(length.astype(jnp.float32)), length)
        live, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), beam)
        # Log-probabilities only fall, so that this is the most that one of them can reach.
        over = (ended >= beam) | (live[:, 0] / largest <= best.score)
        parent = jnp.take_along_axis(origin, kept, axis=1)
        return _Beam(
            length,
            jnp.take_along_axis(pieces, kept[:, :, None], axis=1),
            jnp.where(over[:, None], -jnp.inf, live),
            jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, parent), moving),
            best,
            ended,
        )

    last = jax.lax.while_loop(goes_on, step, start)
    unended = Found(last.pieces[:, 0], jnp.full((rows,), most, jnp.int32), last.totals[:, 0] / largest)
    return jax.tree.map(
        lambda a, b: jnp.where((last.ended > 0).reshape(-1, *[1] * (a.ndim - 1)), a, b), last.best, unended
    )


def _better(best: Found, pieces: Array, scores: Array, length: Array) -> Found:
    """The better of what ended before and of hypotheses that end now: int32 `[b, k, T]`, float32 `[b, k]`."""
    which = jnp.argmax(scores, axis=1)[:, None]
    score = jnp.take_along_axis(scores, which, axis=1)[:, 0]
    better = score > best.score
    return Found(
        jnp.where(better[:, None], jnp.take_along_axis(pieces, which[:, :, None], axis=1)[:, 0], best.pieces),
        jnp.where(better, length, best.length),
        jnp.where(better, score, best.score),
    )
