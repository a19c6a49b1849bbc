"""The choice among all documents: an exact threshold, found in a few passes over the score files.

Scores become 32-bit integers in the same order. A histogram of their upper halves, then one of the lower halves in the bin
of the threshold, give the threshold exactly; memory does not grow with the corpus. Every process finds the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bilevel.tools.select.config import Config
from bilevel.tools.select.corpus import Part
from bilevel.tools.select.scores import Scored, ScoreFiles
from bilevel.types import UserError

Marked: TypeAlias = tuple[Scored, NDArray[np.bool_]]
"""Scores of some documents, and which of these are kept."""
_BINS = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15


class Choice(NamedTuple):
    """Which documents are kept."""

    threshold: int
    """Order key (`order_keys`) of the last document that is kept."""
    documents: list[int]
    """By part: documents that are not blank."""
    kept: list[int]
    """By part: documents that are kept."""
    ties: list[int]
    """By part: of those kept, the ones right at the threshold: the first in the part."""


def choose(config: Config, files: ScoreFiles, parts: list[Part]) -> Choice:
    """Find the documents to keep: exactly as many as the flags ask for; of equal scores the first in the corpus.

    Raises:
      UserError: if the corpus has no text, or fewer documents than are to be kept.
    """

    def keys(part: Part) -> Iterator[NDArray[np.uint32]]:
        return (ranks(config, part.number, scored) for scored in files.read(part))

    documents = [sum(len(scored.score) for scored in files.read(part)) for part in parts]
    if not sum(documents):
        raise UserError(f"{config.corpus} holds no text: give files with text in them.")
    threshold, left = 0, config.count_of(sum(documents))
    for shift in (np.uint32(16), np.uint32(0)):
        histogram = np.zeros(_BINS, np.int64)
        for key in (key >> shift for part in parts for key in keys(part)):
            inside = key[key >> np.uint32(16) == threshold] & np.uint32(_BINS - 1)
            histogram += np.bincount(inside, minlength=_BINS)
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, left))
        left -= int(from_top[place] - histogram[::-1][place])
        threshold = threshold * _BINS + _BINS - 1 - place
    kept, ties = [], []
    for part in parts:
        above, equal = (sum(int(np.sum(test(key, threshold))) for key in keys(part)) for test in (np.greater, np.equal))
        ties.append(min(equal, left - sum(ties)))
        kept.append(above + ties[-1])
    return Choice(threshold, documents, kept, ties)


def marked(choice: Choice, config: Config, files: ScoreFiles, part: Part) -> Iterator[Marked]:
    """Stream the scores of a part, with which documents are kept."""
    ties = choice.ties[part.number]
    for scored in files.read(part):
        key = ranks(config, part.number, scored)
        kept = key > choice.threshold
        tied = np.flatnonzero(key == choice.threshold)[:ties]
        kept[tied] = True
        ties -= len(tied)
        yield scored, kept


def ranks(config: Config, part: int, scored: Scored) -> NDArray[np.uint32]:
    """Return what documents are chosen by, uint32 `[n]`, highest first: scores, or with --rule gumbel random ranks."""
    if config.rule == "top":
        return order_keys(scored.score)
    noise = gumbel(config.seed, part, scored.document)
    return order_keys((scored.score / config.temperature + noise).astype(np.float32))


def gumbel(seed: int, part: int, document: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw Gumbel noise, float64 `[n]`: a pure function of the seed, the part's and each document's number.

    The k documents with the highest score / temperature + noise are a sample without replacement with probabilities
    proportional to exp(score / temperature).

    Reference: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019, section 2. The random bits
    are those of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    start = hashlib.blake2b(f"{seed},{part}".encode(), digest_size=8).digest()
    x = np.uint64(int.from_bytes(start, "little")) + (document.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


def order_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return integers in the order of finite float32 `[n]`, equal for equal values: uint32 `[n]`."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def value_of(key: int) -> float:
    """Return the float32 whose order key this is."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))
