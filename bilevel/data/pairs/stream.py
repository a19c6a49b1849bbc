"""What a source of sentence pairs is, and what is made of one: parts, labels, pairs left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bilevel.data.digests import digest, text_hash
from bilevel.data.opening import Place
from bilevel.data.streams import changed, hashed_parts, held_apart, joined, labelled


class Pair(NamedTuple):
    """A sentence and its translation, in one line each; a side that is missing is `""`."""

    source: str
    target: str
    labels: tuple[str, ...] = ()
    """The language, if there are several; the domain and, if known, the fault, for analysis only."""


class Languages(NamedTuple):
    """From which language to which."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}→{self.target}"


@dataclass(frozen=True)
class PairSource:
    """A stream of sentence pairs that can be read again and again; made by `open_pairs` or `open_specific_pairs`."""

    name: str
    """For messages and manifests."""
    languages: Languages
    read: Callable[[], Iterator[Pair]]
    """Starts a new pass over the pairs. Pairs with an empty side are there too, so that a pair's number is that of its line;
    packing drops and counts them."""
    identify: Callable[[], str]
    """Computes what `fingerprint` returns."""
    label_kinds: tuple[str, ...] = ()
    """What the labels of a pair say: (), ("domain",) or ("domain", "fault"), with "language" in front where there are several."""

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the pairs may have changed; see `bilevel.data.Source.fingerprint`."""
        return digest(["pairs", *self.languages, self.identify()])


def pair_hash(source: str) -> int:
    """The 64-bit hash of the source sentence: equal sentences fall in one part, whatever their translations."""
    return text_hash(source.encode("utf-8", "surrogatepass"))


def joined_pairs(name: str, sources: list[PairSource]) -> PairSource:
    """Read several sources one after the other."""
    return joined(name, sources)


def labelled_pairs(source: PairSource, path: str | Place) -> PairSource:
    """Give each pair the labels of its line in a table: the domain in the first column, and a fault in the second one.

    Args:
        source: the pairs, line i of the table belongs to pair i, pairs with an empty side included.
        path: tab-separated columns, gzipped or not. Where some line has a second column, lines without one have the
            fault "none".

    Raises:
        UserError: there is no such file; while reading, the numbers of lines and pairs differ, or a domain is empty.
    """
    return labelled(source, path, "pairs")


def parts_of_pairs(source: PairSource, shares: dict[str, float]) -> dict[str, PairSource]:
    """Split pairs by the hash of their source sentence, whatever it is translated to; see `hashed_parts`."""
    return hashed_parts(source, shares, lambda pair: pair_hash(pair.source))


def hold_out(source: PairSource, share: float = 0.02) -> tuple[PairSource, PairSource]:
    """Split generic pairs into what is trained on, and a share held out by a hash of the source sentence.

    Returns:
        The pairs to train on, under the name of the source, and those held out.

    Raises:
        UserError: there are too few pairs for one to be held out.
    """
    parts = parts_of_pairs(source, {"held out": share, "train": 1 - share})
    return held_apart(source, parts, share, lambda pair: pair.source and pair.target, "pairs")


def pairs_without(source: PairSource, others: Iterable[PairSource]) -> PairSource:
    """Leave out the pairs whose source sentence stands in one of `others`, such as the test sets."""
    others = list(others)

    def read() -> Iterator[Pair]:
        known = {pair_hash(pair.source) for other in others for pair in other.read()}
        return (pair for pair in source.read() if pair_hash(pair.source) not in known)

    return changed(source, source.name, read, "without", *(other.fingerprint() for other in others))
