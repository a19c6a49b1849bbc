"""Scores of whole documents by a weighting network of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data import Document, DocumentRows, NumpyBatch, Pack, document_blocks, read_ahead
from bilevel.types import Array

_BLOCK_BYTES = 1 << 24


class Scored(NamedTuple):
    """Scores of some documents, in the order of the stream."""

    document: NDArray[np.int64]
    """int64 `[n]`: numbers in the stream, blank documents counted."""
    size: NDArray[np.int64]
    """int64 `[n]`: bytes of each document."""
    score: NDArray[np.float32]
    """float32 `[n]`."""


def score_documents(
    logits: Callable[[NumpyBatch], Array], pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[Scored]:
    """Score documents as a stream: each by the mean logit of its rows, weighted by their bytes.

    Blank ones (`b""`) get no score. While the device works on some documents, a thread cuts the next.

    Args:
        logits: rows -> float32 `[b]`, compiled.
        pack: cuts documents into rows.
        documents: the stream.
        batch_size: b, rows that are scored in one call; the last ones of about 16 MiB of text are padded.
    """
    first = 0
    with read_ahead(enumerate(_cut(pack, documents, batch_size))) as blocks:
        for _, (sizes, batches) in blocks:
            if batches:
                owner = np.concatenate([rows.owner for rows in batches])
                size = np.concatenate([rows.size for rows in batches])
                begun = [logits(rows.batch) for rows in batches]
                found = np.concatenate([np.asarray(x) for x in begun], dtype=np.float64)[: len(owner)]
                weight, total = (np.bincount(owner, x, len(sizes)) for x in (size, size * found))
                chosen = np.flatnonzero(weight)
                yield Scored(first + chosen, sizes[chosen], (total[chosen] / weight[chosen]).astype(np.float32))
            first += len(sizes)


def _cut(
    pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[DocumentRows]]]:
    """Stream the sizes of some documents, and their rows in batches of one size, the last one padded."""
    for block in document_blocks(documents, _BLOCK_BYTES):
        texts, batches = [document.text for document in block], []
        for rows in pack(texts, batch_size):
            if len(rows.owner) < batch_size:
                place = np.minimum(np.arange(batch_size), len(rows.owner) - 1)
                rows = rows._replace(batch={name: x[place] for name, x in rows.batch.items()})
            batches.append(rows)
        yield np.fromiter(map(len, texts), np.int64, len(texts)), batches
