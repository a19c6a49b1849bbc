"""What a source of sentence pairs is, and what is made of one: parts, labels, pairs left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bilevel.data.digests import digest, text_hash
from bilevel.data.opening import Place, exists, place_of
from bilevel.data.text.files import file_fingerprint
from bilevel.data.text.labels import beside, label_lines
from bilevel.types import UserError

_TOP = 1 << 64
_SPACES = re.compile(r"[ \t\r\n\f\v]+")  # no-break spaces stay: French sets them before colons
NO_FAULT = "none"
"""The fault of pairs whose label file has nothing in its second column."""


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


def one_line(text: str) -> str:
    """Return a text with each run of white space as one space, and none at its ends."""
    return _SPACES.sub(" ", text).strip()


def joined_pairs(name: str, sources: list[PairSource]) -> PairSource:
    """Read several sources one after the other."""
    if len(sources) == 1:
        return PairSource(name, *(getattr(sources[0], k) for k in ("languages", "read", "identify", "label_kinds")))
    kinds = {source.label_kinds for source in sources}
    return PairSource(
        name,
        sources[0].languages,
        lambda: (pair for source in sources for pair in source.read()),
        lambda: digest(["joined", *(source.fingerprint() for source in sources)]),
        kinds.pop() if len(kinds) == 1 else (),
    )


def labelled_pairs(source: PairSource, path: str | Place) -> PairSource:
    """Give each pair the labels of its line in a table: the domain in the first column, and a fault in the second one.

    Args:
        source: the pairs, line i of the table belongs to pair i, pairs with an empty side included.
        path: tab-separated columns, gzipped or not. Where some line has a second column, lines without one have the
            fault "none".

    Raises:
        UserError: there is no such file; while reading, the numbers of lines and pairs differ, or a domain is empty.
    """
    table = place_of(path)
    if not exists(table):
        raise UserError(f"The label file {table} does not exist; check the path, or leave --data.generic-labels out.")
    faults = any(b"\t" in line.rstrip() for line in label_lines(table))

    def read() -> Iterator[Pair]:
        for pair, labels in _with_lines(source, table):
            yield pair._replace(labels=(labels[0], labels[1] or NO_FAULT) if faults else labels[:1])

    return PairSource(
        source.name,
        source.languages,
        read,
        lambda: digest(["labelled", source.fingerprint(), file_fingerprint(table)]),
        ("domain", "fault") if faults else ("domain",),
    )


def _with_lines(source: PairSource, table: Place) -> Iterator[tuple[Pair, tuple[str, str]]]:
    for number, (pair, line) in enumerate(beside(source.read(), table, source.name, "pairs"), start=1):
        domain, fault = [*(cell.strip().decode() for cell in line.split(b"\t")), ""][:2]
        if not domain:
            raise UserError(
                f"{table}, line {number}: the first column is empty; every pair needs a domain there (--data.generic-labels)."
            )
        yield pair, (domain, fault)


def hashed_parts(source: PairSource, shares: dict[str, float]) -> dict[str, PairSource]:
    """Split pairs by the hash of their source sentence.

    Args:
        source: the pairs.
        shares: the share of each part, by its name; they sum to 1. A sentence keeps its part when others come or go, and
            whatever it is translated to.

    Returns:
        The parts, by name.
    """
    bounds, low, parts = 0.0, 0, {}
    for part, share in shares.items():
        bounds += share
        high = _TOP if part == list(shares)[-1] else round(bounds * _TOP)
        parts[part] = _between(source, part, low, high)
        low = high
    return parts


def _between(source: PairSource, part: str, low: int, high: int) -> PairSource:
    return PairSource(
        f"{source.name} ({part})",
        source.languages,
        lambda: (pair for pair in source.read() if low <= pair_hash(pair.source) < high),
        lambda: digest(["between", low, high, source.fingerprint()]),
        source.label_kinds,
    )


def hold_out(source: PairSource, share: float = 0.02) -> tuple[PairSource, PairSource]:
    """Split generic pairs into what is trained on, and a share held out by a hash of the source sentence.

    Returns:
        The pairs to train on, under the name of the source, and those held out.

    Raises:
        UserError: there are too few pairs for one to be held out.
    """
    parts = hashed_parts(source, {"held out": share, "train": 1 - share})
    train = parts["train"]
    if not any(pair.source and pair.target for pair in parts["held out"].read()):
        raise UserError(
            f"{source.name} has too few different pairs to hold {share:.0%} of them out: give more generic data (--data.generic)."
        )
    return PairSource(source.name, train.languages, train.read, train.identify, train.label_kinds), parts["held out"]


def pairs_without(source: PairSource, others: Iterable[PairSource]) -> PairSource:
    """Leave out the pairs whose source sentence stands in one of `others`, such as the test sets."""
    others = list(others)

    def read() -> Iterator[Pair]:
        known = {pair_hash(pair.source) for other in others for pair in other.read()}
        return (pair for pair in source.read() if pair_hash(pair.source) not in known)

    return PairSource(
        source.name,
        source.languages,
        read,
        lambda: digest(["without", source.fingerprint(), *(other.fingerprint() for other in others)]),
        source.label_kinds,
    )
