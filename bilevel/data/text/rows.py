"""Documents cut into rows, a block of documents at a time and with no Python for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bilevel.data.digests import Document
from bilevel.data.loading.arrays import NumpyBatch

SHORTEST_TAIL = 16
"""A last window shorter than this (and than the row length) is dropped, unless it is its document's only
one."""
_BLOCK_BYTES = 1 << 20
_BLOCK_DOCUMENTS = 1 << 16


class Rows(NamedTuple):
    """Rows cut from a list of texts, in their order."""

    tokens: NDArray[np.uint8]
    """uint8 `[n, T]`, zero beyond `length`."""
    length: NDArray[np.int32]
    """int32 `[n]`: the real bytes of each row, 1 to T."""
    owner: NDArray[np.int64]
    """int64 `[n]`: the position of each row's text in the list."""


class DocumentRows(NamedTuple):
    """Rows that documents were cut into, in order."""

    batch: NumpyBatch
    """As the weighting network takes them."""
    owner: NDArray[np.integer[Any]]
    """`[b]`: the position of each row's document."""
    size: NDArray[np.integer[Any]]
    """`[b]`: the bytes of text in each row."""


Pack: TypeAlias = Callable[[list[bytes], int], Iterator[DocumentRows]]
"""(documents in UTF-8, most rows) -> their rows, in batches of that size, the last one excepted; none for `b""`."""


def document_blocks(documents: Iterable[Document], block_bytes: int = _BLOCK_BYTES) -> Iterator[list[Document]]:
    """Group documents into lists of at least `block_bytes` bytes (the last one excepted), or of 65,536 documents."""
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= block_bytes or len(block) >= _BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut_rows(texts: list[bytes], length: int, most_rows: int | None = None) -> Iterator[Rows]:
    """Cut texts into rows: the consecutive windows of `length` bytes of each.

    A last window shorter than `min(16, length)` bytes is dropped unless it is its text's only one; an empty text gives
    no row.

    Args:
        texts: the texts.
        length: T, the bytes of a row.
        most_rows: rows in one piece; by default as many as fill 1 MiB, so that memory stays bounded also for one huge
            text.

    Yields:
        The rows of all texts, in pieces of `most_rows` rows, the last one excepted.
    """
    flat, starts, lengths, owner = _windows(texts, length)
    view = sliding_window_view(flat, length)
    positions = np.arange(length)
    chunk = most_rows or max(1, _BLOCK_BYTES // length)
    for first in range(0, len(starts), chunk):
        part = slice(first, first + chunk)
        tokens = view[starts[part]]
        tokens[positions >= lengths[part, None]] = 0
        yield Rows(tokens, lengths[part].astype(np.int32), owner[part])


def _windows(
    texts: list[bytes], length: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find the windows of the texts.

    Returns:
        All texts joined and followed by `length` zero bytes, uint8; and for each of the n windows, in order,
        its start in there, its length (1 to `length`) and the position of its text in `texts`, each int64
        `[n]`.
    """
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    flat = np.frombuffer(b"".join([*texts, bytes(length)]), np.uint8)
    full, rest = np.divmod(sizes, length)
    keep_rest = (rest >= min(SHORTEST_TAIL, length)) | ((full == 0) & (rest > 0))
    counts = full + keep_rest
    owner = np.repeat(np.arange(len(texts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # which window of its text
    starts = np.repeat(np.cumsum(sizes) - sizes, counts) + place * length
    lengths = np.minimum(sizes[owner] - place * length, length)
    return flat, starts, lengths, owner
