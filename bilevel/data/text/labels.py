"""Labels of documents or pairs from a table beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from bilevel.data.digests import Document
from bilevel.data.opening import Place
from bilevel.data.text.files import line_blocks
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
            raise UserError(f"{path}, line {number}: the first column is empty; every document needs a label there.")
        yield Document(document.text, label)


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


def _mismatch(path: Place, lines: int, source_name: str, count: int, unit: str) -> UserError:
    one = unit.split(" ")[0].removesuffix("s")
    return UserError(
        f"The label file {path} has {lines} lines, but {source_name} has {count} {unit}; line i must hold the label of "
        f"{one} i, so give the label file that belongs to this text (--data.generic-labels)."
    )
