"""The choice among all documents: an exact threshold, found in a few passes over the score files.

Scores become 32-bit integers in the same order. A histogram of their upper halves, then one of the lower halves in the bin
of the threshold, give the threshold exactly; memory does not grow with the corpus. Every process finds the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError
from experiments.select.config import Config
from experiments.select.corpus import Part
from experiments.select.scores import Scored, ScoreFiles

_BINS = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15


class PartChoice(NamedTuple):
    """What is kept of one part."""

    documents: int
    """Documents that are not blank."""
    kept: int
    ties: int
    """Of those kept, the ones right at the threshold: the first in the part."""


class Choice(NamedTuple):
    """Which documents are kept."""

    threshold: int
    """Order key (`order_keys`) of the last document that is kept."""
    parts: list[PartChoice]

    @property
    def documents(self) -> int:
        """Documents that are not blank."""
        return sum(part.documents for part in self.parts)

    @property
    def kept(self) -> int:
        """Documents that are kept."""
        return sum(part.kept for part in self.parts)


def choose(config: Config, files: ScoreFiles, parts: list[Part]) -> Choice:
    """Finds the documents to keep: exactly as many as the flags ask for; of equal scores the first in the corpus.

    Raises:
      UserError: if the corpus has no text, or fewer documents than are to be kept.
    """

    def keys() -> Iterator[NDArray[np.uint32]]:
        return (ranks(config, part.number, scored) for part in parts for scored in files.read(part))

    upper = _histogram(key >> np.uint32(16) for key in keys())
    documents = int(upper.sum())
    if not documents:
        raise UserError(f"{config.corpus} holds no text: give files with text in them.")
    count = config.count_of(documents)
    high, above = _bin_of(upper, count)
    lower = _histogram(key[key >> np.uint32(16) == high] & np.uint32(_BINS - 1) for key in keys())
    low, above_there = _bin_of(lower, count - above)
    return _shared_out(config, files, parts, high * _BINS + low, count - above - above_there)


def _shared_out(config: Config, files: ScoreFiles, parts: list[Part], threshold: int, ties: int) -> Choice:
    """Counts what each part keeps, with `ties` documents at the threshold in all."""
    found = []
    for part in parts:
        documents = above = equal = 0
        for scored in files.read(part):
            key = ranks(config, part.number, scored)
            documents += len(key)
            above += int(np.count_nonzero(key > threshold))
            equal += int(np.count_nonzero(key == threshold))
        taken = min(equal, ties)
        ties -= taken
        found.append(PartChoice(documents, above + taken, taken))
    return Choice(threshold, found)


def kept_mask(choice: Choice, part: Part, config: Config) -> Callable[[Scored], NDArray[np.bool_]]:
    """A function that tells which documents of a part are kept, to be called with all its scores in order."""
    ties = choice.parts[part.number].ties

    def mask(scored: Scored) -> NDArray[np.bool_]:
        nonlocal ties
        key = ranks(config, part.number, scored)
        kept = key > choice.threshold
        tied = np.flatnonzero(key == choice.threshold)[:ties]
        kept[tied] = True
        ties -= len(tied)
        return kept

    return mask


def ranks(config: Config, part: int, scored: Scored) -> NDArray[np.uint32]:
    """What documents are chosen by, uint32 `[n]`, highest first: the score, or with --rule gumbel a random rank."""
    if config.rule == "top":
        return order_keys(scored.score)
    noise = gumbel(config.seed, part, scored.document)
    return order_keys((scored.score / config.temperature + noise).astype(np.float32))


def gumbel(seed: int, part: int, document: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise, float64 `[n]`: a pure function of the seed, the part's and each document's number.

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
    """Integers in the order of finite float32 `[n]`, equal for equal values: uint32 `[n]`."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def value_of(key: int) -> float:
    """The float32 whose order key this is."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _histogram(halves: Iterator[NDArray[np.uint32]]) -> NDArray[np.int64]:
    total = np.zeros(_BINS, np.int64)
    for half in halves:
        total += np.bincount(half, minlength=_BINS)
    return total


def _bin_of(histogram: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th highest, and how many lie in bins above it."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, count))
    return _BINS - 1 - place, int(from_top[place] - histogram[_BINS - 1 - place])
