"""What streams of items (sentence pairs, captioned images) share: joining, labels from a table beside, parts by a hash."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.opening import Place, exists, place_of
from bilevel.data.text.files import file_fingerprint
from bilevel.data.text.labels import beside, label_lines
from bilevel.types import UserError

NO_FAULT = "none"
"""The fault of items whose label file has nothing in its second column."""
_TOP = 1 << 64
_SPACES = re.compile(r"[ \t\r\n\f\v]+")  # no-break spaces stay: French sets them before colons


def one_line(text: str) -> str:
    """Return a text with each run of white space as one space, and none at its ends."""
    return _SPACES.sub(" ", text).strip()


class RowLabels(NamedTuple):
    """What is known of each row, for analysis only."""

    values: NDArray[np.int32]
    """int32 `[N]`: positions in `names`."""
    names: tuple[str, ...]
    """In the order of their first appearance."""


class Stream(Protocol):
    """A frozen dataclass with these fields; its items are named tuples with a field `labels`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """For messages and manifests."""
        ...

    @property
    def read(self) -> Callable[[], Iterator[Any]]:
        """Starts a new pass over the items."""
        ...

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """What the labels of an item say."""
        ...

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the items may have changed."""
        ...


S = TypeVar("S", bound=Stream)


def changed(stream: S, name: str, read: Callable[[], Iterator[Any]], *identity: str | int, **fields: Any) -> S:
    """Return a stream with another name and other items.

    Args:
        stream: what it is made of.
        name: the new name.
        read: starts a new pass over the new items.
        *identity: what was done; with the fingerprint of `stream` it identifies the new items.
        **fields: other fields of the dataclass to replace.
    """

    def identify() -> str:
        return digest([*identity, stream.fingerprint()])

    return dataclasses.replace(stream, name=name, read=read, identify=identify, **fields)


def joined(name: str, streams: Sequence[S], **fields: Any) -> S:
    """Read several streams one after the other, under another name."""
    if len(streams) == 1:
        return dataclasses.replace(streams[0], name=name, **fields)
    kinds = {stream.label_kinds for stream in streams}
    return dataclasses.replace(
        streams[0],
        name=name,
        read=lambda: (item for stream in streams for item in stream.read()),
        identify=lambda: digest(["joined", *(stream.fingerprint() for stream in streams)]),
        label_kinds=kinds.pop() if len(kinds) == 1 else (),
        **fields,
    )


def labelled(stream: S, path: str | Place, unit: str, *, faults: bool = True) -> S:
    """Give each item the labels of its line in a table: the domain in the first column, and a fault in the second one.

    Args:
        stream: the items; line i of the table belongs to item i, items that packing drops included.
        path: tab-separated columns, compressed or not. Where some line has a second column, lines without one have the
            fault "none".
        unit: what the items are called, in the plural, for messages.
        faults: whether a second column tells faults; otherwise it is not read.

    Raises:
        UserError: there is no such file; while reading, the numbers of lines and items differ, or a domain is empty.
    """
    table = place_of(path)
    if not exists(table):
        raise UserError(f"The label file {table} does not exist; check the path, or leave --data.generic-labels out.")
    faults = faults and any(b"\t" in line.rstrip() for line in label_lines(table))

    def read() -> Iterator[Any]:
        for number, (item, line) in enumerate(beside(stream.read(), table, stream.name, unit), start=1):
            domain, fault = [*(cell.strip().decode() for cell in line.split(b"\t")), ""][:2]
            if not domain:
                one = unit.removesuffix("s")
                raise UserError(
                    f"{table}, line {number}: the first column is empty; every {one} needs a domain there "
                    "(--data.generic-labels)."
                )
            yield item._replace(labels=(domain, fault or NO_FAULT) if faults else (domain,))

    kinds = ("domain", "fault") if faults else ("domain",)
    return changed(stream, stream.name, read, "labelled", file_fingerprint(table), label_kinds=kinds)


def hashed_parts(stream: S, shares: dict[str, float], key: Callable[[Any], int]) -> dict[str, S]:
    """Split the items of a stream by a hash.

    Args:
        stream: the items.
        shares: the share of each part, by its name; they sum to 1. An item keeps its part when others come or go.
        key: item -> 64-bit hash of what must not be in two parts.

    Returns:
        The parts, by name.
    """
    bounds, low, parts = 0.0, 0, {}
    for part, share in shares.items():
        bounds += share
        high = _TOP if part == list(shares)[-1] else round(bounds * _TOP)
        parts[part] = _between(stream, part, low, high, key)
        low = high
    return parts


def _between(stream: S, part: str, low: int, high: int, key: Callable[[Any], int]) -> S:
    def read() -> Iterator[Any]:
        return (item for item in stream.read() if low <= key(item) < high)

    return changed(stream, f"{stream.name} ({part})", read, "between", low, high)


def held_apart(source: S, parts: dict[str, S], share: float, usable: Callable[[Any], Any], unit: str) -> tuple[S, S]:
    """Return the parts "train", under the name of the source, and "held out" of a stream.

    Args:
        source: the whole.
        parts: of it.
        share: that of the second, for messages.
        usable: item -> whether packing keeps it.
        unit: what the items are called, in the plural, for messages.

    Raises:
        UserError: no usable item is held out.
    """
    if not any(map(usable, parts["held out"].read())):
        raise UserError(
            f"{source.name} has too few different {unit} to hold {share:.0%} of them out: give more generic data "
            "(--data.generic)."
        )
    return dataclasses.replace(parts["train"], name=source.name), parts["held out"]
