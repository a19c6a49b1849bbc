"""Rows that go on from one document to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bilevel.data.loading.arrays import NumpyBatch
from bilevel.data.text.rows import SHORTEST_TAIL
from bilevel.data.text.tokenizers import TextTokenizer, Tokens
from bilevel.types import UserError

HELD_OUT_SHARE = 1 / 50
"""Share of the generic documents that is held out, by a hash of their text: sources that take turns are all in it."""


def end_of(tokenizer: TextTokenizer | None) -> int:
    """Return the token that stands behind each document: byte 0, or the tokenizer's.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer is None:
        return 0
    if tokenizer.end is None:
        raise UserError(
            f"{tokenizer.name} names no token for the end of a document (eos_token in tokenizer_config.json beside it): add one, "
            "or omit --data.crossing."
        )
    return tokenizer.end


def with_ends(tokens: Tokens, sizes: np.ndarray, end: int) -> tuple[NumpyBatch, np.ndarray]:
    """Put a token behind each text that has any.

    Args:
        tokens: those of some texts, with their starts.
        sizes: int64 `[texts]`, the bytes of each text.
        end: that token, of no bytes.

    Returns:
        `tokens` and `size` (the bytes of each token, int32), `[n]`; and the text of each token, int64 `[n]`.
    """
    counts = tokens.counts
    ends = np.cumsum(counts)
    own = np.flatnonzero(counts)
    following = np.append(tokens.starts, 0)[1:]
    following[ends[own] - 1] = sizes[own]
    places, owner = ends[own], np.repeat(np.arange(len(counts)), counts)
    found = {
        "tokens": np.insert(tokens.ids, places, end),
        "size": np.insert((following - tokens.starts).astype(np.int32), places, 0),
    }
    return found, np.insert(owner, places, own)


class RowJoiner:
    """Cuts a stream of tokens into rows of `length`; what is left over waits for what comes next.

    Args:
        length: T.
    """

    def __init__(self, length: int):
        self._length = length
        self._rest: NumpyBatch = {}
        self._any = False

    def add(self, columns: Mapping[str, np.ndarray]) -> NumpyBatch:
        """Take columns of values of tokens, `[n]`, and return rows.

        Returns:
            `tokens` `[rows, T]`; `size` `[rows]`, the sums; `length` `[rows]`; and the other columns `[rows]`: the values of the
            first token of each row.
        """
        joined = {
            name: np.concatenate([self._rest[name], x]) if self._rest else np.asarray(x) for name, x in columns.items()
        }
        whole = len(joined["tokens"]) // self._length * self._length
        self._rest = {name: x[whole:] for name, x in joined.items()}
        self._any = self._any or whole > 0
        return self._rows({name: x[:whole] for name, x in joined.items()}, self._length)

    def finish(self) -> Iterator[NumpyBatch]:
        """Give what is left over as a last row, if it is not too short or the only one."""
        count = len(self._rest["tokens"]) if self._rest else 0
        if count >= min(SHORTEST_TAIL, self._length) or (count and not self._any):
            padded = {name: np.pad(x, (0, self._length - count)) for name, x in self._rest.items()}
            yield self._rows(padded, count)

    def _rows(self, columns: NumpyBatch, length: int) -> NumpyBatch:
        rows = {name: x.reshape(-1, self._length) for name, x in columns.items()}
        found = {name: x[:, 0] for name, x in rows.items()}
        size = rows["size"].sum(axis=1, dtype=np.int32)
        return {**found, "tokens": rows["tokens"], "size": size, "length": np.full(len(size), length, np.int32)}
