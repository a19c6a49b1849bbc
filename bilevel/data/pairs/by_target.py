"""Pairs of several source languages by their target sentence: which languages each target can be translated from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.pairs.packed_pairs import PackedPairs
from bilevel.data.pairs.stream import Languages, Pair, PairSource
from bilevel.types import UserError

LANGUAGE = "language"
"""The kind of label that names a pair's source language."""


class PairsByTarget(NamedTuple):
    """A table of rows: targets down, source languages across."""

    rows: NDArray[np.int32]
    """int32 `[T, n]`: row numbers; −1 where a target has no sentence in that language. Each row stands there once."""
    languages: tuple[str, ...]
    """The names of the n columns."""

    def only(self, names: Sequence[str]) -> PairsByTarget:
        """Keep some languages, in the order given, and the targets that have one of them.

        Raises:
            UserError: a language is not in the table.
        """
        if missing := [name for name in names if name not in self.languages]:
            raise UserError(
                f"The pairs have no {' and no '.join(missing)}, but {', '.join(self.languages)}: choose among these."
            )
        rows = self.rows[:, [self.languages.index(name) for name in names]]
        return PairsByTarget(rows[(rows >= 0).any(axis=1)], tuple(names))

    def apart(self) -> PairsByTarget:
        """Make each pair a target of its own: drawn uniformly, targets are then pairs."""
        targets, columns = np.nonzero(self.rows >= 0)
        rows = np.full((len(targets), len(self.languages)), -1, np.int32)
        rows[np.arange(len(targets)), columns] = self.rows[targets, columns]
        return PairsByTarget(rows, self.languages)


def multilingual_pairs(name: str, sources: Mapping[str, PairSource]) -> PairSource:
    """Read the pairs of several source languages one after the other, each with its language as a label, before its others.

    Args:
        name: for messages.
        sources: by language, all into one target language, and all with labels of the same kinds.

    Raises:
        UserError: there are none, or they differ in their target language or in the kinds of their labels.
    """
    if not sources:
        raise UserError(f"{name}: there are no languages; give at least one.")
    first = next(iter(sources.values()))
    for language, source in sources.items():
        if source.languages.target != first.languages.target:
            raise UserError(
                f"{name}: {language} is translated to {source.languages.target}, the first language to "
                f"{first.languages.target}; open all with one --data.target-language."
            )
        if source.label_kinds != first.label_kinds or LANGUAGE in source.label_kinds:
            raise UserError(
                f"{name}: the pairs of {language} have the labels {source.label_kinds}, the first {first.label_kinds}; give all "
                "the same kinds, none of them called language."
            )

    def read() -> Iterator[Pair]:
        for language, source in sources.items():
            for pair in source.read():
                yield pair._replace(labels=(language, *pair.labels))

    return PairSource(
        name,
        Languages("+".join(sources), first.languages.target),
        read,
        lambda: digest(["multilingual", *itertools.chain(*((k, s.fingerprint()) for k, s in sources.items()))]),
        (LANGUAGE, *first.label_kinds),
    )


def pairs_by_target(data: PackedPairs | Mapping[str, PackedPairs]) -> PairsByTarget:
    """Group pairs by their exact target sentence.

    A target that a language has k sentences for stands in the table k times: the first time with the first sentence of each
    language, the second time with the second ones, where there are such. So no row is left out.

    Args:
        data: pairs with the label "language" (`multilingual_pairs`); or packed pairs by language, whose rows are numbered as
            those of `JoinedData` of the same mapping.

    Returns:
        The table; targets in the order of their first rows.

    Raises:
        UserError: there is no such label.
    """
    if isinstance(data, PackedPairs):
        if LANGUAGE not in data.labels:
            raise UserError(
                f"{data.name} does not say the language of its pairs: join sources by multilingual_pairs before packing, or give "
                "the packed pairs of each language."
            )
        parts, labels = [data], data.labels[LANGUAGE]
        column, names = np.asarray(labels.values), labels.names
    else:
        if not data:
            raise UserError("There are no packed pairs to group: give those of at least one language.")
        parts, names = list(data.values()), tuple(data)
        column = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return PairsByTarget(_table(_groups(parts), column, len(names)), tuple(names))


def _table(groups: NDArray[np.int64], column: NDArray[np.integer], count: int) -> NDArray[np.int32]:
    """The table of rows whose targets are equal where their groups are."""
    cells = groups * count + column
    order = np.argsort(cells, kind="stable")
    found = cells[order]
    begins = np.flatnonzero(np.diff(found, prepend=-1))
    occurrence = np.empty(len(cells), np.int64)
    occurrence[order] = np.arange(len(cells)) - np.repeat(begins, np.diff(begins, append=len(cells)))
    _, first, line = np.unique(groups * (occurrence.max() + 1) + occurrence, return_index=True, return_inverse=True)
    line = np.argsort(np.argsort(first))[line]  # in the order of the first rows
    table = np.full((len(first), count), -1, np.int32)
    table[line, column] = np.arange(len(cells), dtype=np.int32)
    return table


def _groups(parts: Sequence[PackedPairs]) -> NDArray[np.int64]:
    """A number for each row, equal for equal target sentences, byte for byte."""
    sides = [part.target_bytes() for part in parts]
    text = np.concatenate([flat for flat, _, _ in sides])
    offsets = np.cumsum([0, *(len(flat) for flat, _, _ in sides)])[:-1]
    starts = np.concatenate([start + offset for (_, start, _), offset in zip(sides, offsets, strict=True)])
    lengths = np.concatenate([length for _, _, length in sides])
    groups, count = np.empty(len(starts), np.int64), 0
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        letters = np.ascontiguousarray(text[starts[rows][:, None] + np.arange(length)])
        _, inverse = np.unique(letters.view(f"V{length}").ravel(), return_inverse=True)
        groups[rows] = inverse + count
        count += int(inverse.max()) + 1
    return groups
