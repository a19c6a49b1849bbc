"""Labels of documents from a table beside the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bilevel.data.digests import Document
from bilevel.data.opening import Place
from bilevel.data.text.files import line_blocks
from bilevel.types import UserError


def with_labels(documents: Iterable[Document], path: Place, source_name: str) -> Iterator[Document]:
    """Give each document the label in the first column of its line in a table with tab-separated columns.

    Args:
        documents: the documents, blank ones included: line i belongs to document i.
        path: the table; compressed with gzip or not.
        source_name: for messages.

    Raises:
        UserError: the numbers of lines and documents differ, or a label is empty.
    """
    lines = (line for block in line_blocks(path) for line in block)
    rest = iter(documents)
    count = 0
    for document in rest:
        line = next(lines, None)
        if line is None:
            raise _mismatch(path, count, source_name, count + 1 + sum(1 for _ in rest))
        count += 1
        label = line.split(b"\t", 1)[0].strip().decode("utf-8")
        if document.text and not label:
            raise UserError(f"{path}, line {count}: the first column is empty; every document needs a label there.")
        yield Document(document.text, label)
    more = sum(1 for _ in lines)
    if more:
        raise _mismatch(path, count + more, source_name, count)


def _mismatch(path: Place, lines: int, source_name: str, documents: int) -> UserError:
    return UserError(
        f"The label file {path} has {lines} lines, but {source_name} has {documents} documents (blank lines "
        "count); line i must hold the label of document i, so give the label file that belongs to this text "
        "(--data.generic-labels)."
    )
