"""Labels of documents or pairs, and what is known of the faults of documents, from a table beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import Document
from bilevel.data.opening import Place
from bilevel.data.text.lines import line_blocks
from bilevel.types import UserError

T = TypeVar("T")


def with_labels(documents: Iterable[Document], path: Place, source_name: str) -> Iterator[Document]:
    """Give each document the label in the first column of its line in a table with tab-separated columns.

    Args:
        documents: the documents, blank ones included: line i belongs to document i.
        path: the table; compressed with gzip or not.
        source_name: for messages.

    Raises:
        UserError: the numbers of lines and documents differ, or a label is empty.
    """
    lines = beside(documents, path, source_name, "documents (blank lines count)")
    for number, (document, line) in enumerate(lines, start=1):
        label = line.split(b"\t", 1)[0].strip().decode("utf-8")
        if document.text and not label:
            raise UserError(
                f"{path}, line {number}: the first column is empty; every document needs a label there (--data.generic-labels)."
            )
        yield document._replace(label=label)


def label_lines(path: Place) -> Iterator[bytes]:
    """Stream the lines of a label file, line ends included."""
    return (line for block in line_blocks(path) for line in block)


def beside(items: Iterable[T], path: Place, source_name: str, unit: str) -> Iterator[tuple[T, bytes]]:
    """Pair each item with its line of a label file.

    Args:
        items: line i belongs to item i.
        path: the label file.
        source_name: for messages.
        unit: what the items are, for messages.

    Raises:
        UserError: the numbers of lines and items differ.
    """
    lines = label_lines(path)
    rest = iter(items)
    count = 0
    for item in rest:
        line = next(lines, None)
        if line is None:
            raise _mismatch(path, count, source_name, count + 1 + sum(1 for _ in rest), unit)
        count += 1
        yield item, line
    more = sum(1 for _ in lines)
    if more:
        raise _mismatch(path, count + more, source_name, count, unit)


def _mismatch(path: Place, lines: int, source_name: str, count: int, unit: str, what: str = "label") -> UserError:
    one = unit.split(" ")[0].removesuffix("s")
    return UserError(
        f"The {what} file {path} has {lines} lines, but {source_name} has {count} {unit}; line i must hold the {what} of "
        f"{one} i, so give the {what} file that belongs to this text (--data.generic-{what}s)."
    )


_FAULTS = {b"right": 0, b"0": 0, b"wrong": 1, b"1": 1, b"": -1}


def read_faults(path: Place, documents: int, source_name: str) -> NDArray[np.int8]:
    """Read which documents are known to be right or wrong, from the first column of a table with tab-separated columns.

    Args:
        path: the table, a line a document: right or 0, wrong or 1, or nothing; compressed or not.
        documents: how many there are, blank ones included.
        source_name: for messages.

    Returns:
        int8 `[documents]`: 0 right, 1 wrong, −1 not known.

    Raises:
        UserError: the numbers of lines and documents differ, the column holds something else, or nothing but blanks.
    """
    found: list[int] = []
    for line in label_lines(path):
        word = line.split(b"\t", 1)[0].strip()
        if word not in _FAULTS:
            raise UserError(
                f'{path}, line {len(found) + 1}: the first column is "{word.decode("utf-8")}"; write right or 0, wrong or 1, or '
                "nothing for a document of which that is not known."
            )
        found.append(_FAULTS[word])
    if len(found) != documents:
        raise _mismatch(path, len(found), source_name, documents, "documents (blank lines count)", "fault")
    faults = np.asarray(found, np.int8)
    if not (faults >= 0).any():
        raise UserError(f"{path} says of no document whether it is right or wrong: mark some, or omit the file.")
    return faults
