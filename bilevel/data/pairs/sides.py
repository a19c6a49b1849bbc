"""Pairs from two files, one for each language: line by line, or joined by what both call a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bilevel.data.opening import Place
from bilevel.data.pairs.catalogues import entries
from bilevel.data.pairs.stream import Pair
from bilevel.data.streams import one_line
from bilevel.data.text.kinds import suffix_of
from bilevel.data.text.lines import lines_of
from bilevel.types import UserError

_CATALOGUES = (".po", ".mo")


def pairs_of_sides(source: Place, target: Place) -> Iterator[Pair]:
    """Stream the pairs of two files.

    Lines of text belong together by their number. Two tables (.tsv: `id<TAB>text`) and two catalogues (.po, .mo) are joined by
    the id, in the order of the source file; an id without a translation gives an empty target.

    Raises:
        UserError: the files have different numbers of lines, no id is in both, or a line of a table is none of `id<TAB>text`.
    """
    if suffix_of(source) in (".tsv", *_CATALOGUES) and suffix_of(target) in (".tsv", *_CATALOGUES):
        return _by_id(source, target)
    return _by_line(source, target)


def _by_line(source: Place, target: Place) -> Iterator[Pair]:
    left, right = lines_of(source), lines_of(target)
    for count, (one, other) in enumerate(itertools.zip_longest(left, right)):
        if one is None or other is None:
            more = 1 + sum(1 for _ in (right if one is None else left))
            counts = (count, count + more) if one is None else (count + more, count)
            raise UserError(
                f"{source} has {counts[0]:,} lines, but {target} has {counts[1]:,}: line i of one must be the translation of "
                "line i of the other, so give two files that belong together."
            )
        yield Pair(one_line(one), one_line(other))


def _by_id(source: Place, target: Place) -> Iterator[Pair]:
    translations = dict(_keyed(target))
    found = 0
    for key, text in _keyed(source):
        found += key in translations
        yield Pair(one_line(text), one_line(translations.get(key, "")))
    if not found:
        raise UserError(
            f"No id of {source} is in {target} ({len(translations):,} ids, such as {next(iter(translations), '')!r}): the first "
            "column of both tables must name the sentence."
        )


def _keyed(path: Place) -> Iterator[tuple[str, str]]:
    if suffix_of(path) in _CATALOGUES:
        yield from ((entry.key, entry.target) for entry in entries(path))
        return
    for number, line in enumerate(lines_of(path), start=1):
        key, tab, text = line.partition("\t")
        if line and not tab:
            raise UserError(
                f"{path}, line {number}: there is no tab; a table of one language has lines `id<TAB>text` (call it .txt if its "
                "lines are sentences)."
            )
        yield key, text
