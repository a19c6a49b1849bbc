"""Scores of whole documents by a weighting network of rows, and the choice of the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
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
    text: NDArray[np.int64]
    """int64 `[n]`: equal for equal texts, a digest of 8 bytes."""


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
        for _, (sizes, texts, batches) in blocks:
            if batches:
                owner = np.concatenate([rows.owner for rows in batches])
                size = np.concatenate([rows.size for rows in batches])
                begun = [logits(rows.batch) for rows in batches]
                found = np.concatenate([np.asarray(x) for x in begun], dtype=np.float64)[: len(owner)]
                weight, total = (np.bincount(owner, x, len(sizes)) for x in (size, size * found))
                chosen = np.flatnonzero(weight)
                score = (total[chosen] / weight[chosen]).astype(np.float32)
                yield Scored(first + chosen, sizes[chosen], score, texts[chosen])
            first += len(sizes)


def digests(texts: Sequence[bytes]) -> NDArray[np.int64]:
    """Return a number for each text, int64 `[n]`, equal for equal ones: BLAKE2b of 8 bytes.

    Of a billion different texts, two have the same number with a chance of 3 %.
    """
    return np.frombuffer(b"".join(blake2b(text, digest_size=8).digest() for text in texts), "<i8").astype(np.int64)


def drawn_ranks(scores: NDArray[np.float32], temperature: float, seed: Sequence[int]) -> NDArray[np.float32]:
    """Return scores with noise, float32 `[n]`: the highest k are a draw without replacement.

    The k documents with the highest score / temperature + Gumbel noise are a sample with probabilities proportional to
    exp(score / temperature). The seed decides the noise.

    Reference: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019, section 2.
    """
    noise = np.random.default_rng(seed).gumbel(size=len(scores))
    return (scores / temperature + noise).astype(np.float32)


def highest_documents(ranks: Sequence[NDArray[np.float32]], count: int) -> tuple[float, list[NDArray[np.bool_]]]:
    """Find exactly `count` documents with the highest ranks, scores or `drawn_ranks`; of equal ones the first in the corpus.

    Args:
        ranks: of the documents of each part of the corpus.
        count: at least 1, at most as many as there are documents.

    Returns:
        The rank of the last one found; and by part, of each document, whether it is among them.
    """
    whole = np.concatenate(ranks)
    threshold = np.partition(whole, len(whole) - count)[len(whole) - count]
    kept = whole > threshold
    kept[np.flatnonzero(whole == threshold)[: count - kept.sum()]] = True
    return float(threshold), np.split(kept, np.cumsum([len(x) for x in ranks])[:-1])


def _cut(
    pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], list[DocumentRows]]]:
    """Stream sizes and digests of some documents, and their rows in batches of one size, the last one padded."""
    for block in document_blocks(documents, _BLOCK_BYTES):
        texts, batches = [document.text for document in block], []
        for rows in pack(texts, batch_size):
            if len(rows.owner) < batch_size:
                place = np.minimum(np.arange(batch_size), len(rows.owner) - 1)
                rows = rows._replace(batch={name: x[place] for name, x in rows.batch.items()})
            batches.append(rows)
        yield np.fromiter(map(len, texts), np.int64, len(texts)), digests(texts), batches
