"""The specific data: three disjoint parts, one to learn the weights from, one to choose by, one to report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

from bilevel.data.digests import Document, Source, digest
from bilevel.data.opening import Place, is_folder, name_of, place_of
from bilevel.data.text.files import source_of_files, text_files
from bilevel.data.text.python import topics_parts
from bilevel.data.text.sources import open_source
from bilevel.types import UserError

PARTS = ("train", "valid", "test")
_PREFIXES = {"train": ("train",), "valid": ("val", "dev"), "test": ("test",)}
_BOUNDS = {"train": range(8), "valid": range(8, 9), "test": range(9, 10)}


def open_specific(
    spec: str, *, field: str | None = None, documents: Literal["line", "file"] = "line"
) -> dict[str, Source]:
    """Open specific data as three disjoint parts.

    A folder whose text files are called train*, valid* (or val*, dev*) and test* gives those; `python:topics`
    is split by topic. Everything else is split by its text: the 64-bit BLAKE2b hash of a document modulo 10
    puts it in train (0 to 7), valid (8) or test (9). So equal documents fall in one part, and a document
    keeps its part when others come or go.

    Args:
        spec: as for `open_source`.
        field: as for `open_source`.
        documents: as for `open_source`.

    Returns:
        The sources of `train`, `valid` and `test`, in this order.

    Raises:
        UserError: a part is missing or empty, or as `open_source`.
    """
    if spec == "python:topics" and field is None and documents == "line":
        return topics_parts()
    folder = place_of(spec)
    named = _named_parts(folder) if is_folder(folder) else {}
    if named:
        return {part: source_of_files(f"{spec} ({part})", paths, field, documents) for part, paths in named.items()}
    source = open_source(spec, field=field, documents=documents)
    _check_parts(source)
    return {part: _part_of(source, part) for part in PARTS}


def _named_parts(folder: Place) -> dict[str, list[Place]]:
    files = text_files(folder)
    found = {part: [f for f in files if name_of(f).lower().startswith(_PREFIXES[part])] for part in PARTS}
    if not any(found.values()):
        return {}
    missing = [part for part in PARTS if not found[part]]
    if missing:
        names = ", ".join(map(name_of, files))
        raise UserError(
            f"The folder {folder} holds no text file for {' and '.join(missing)} (it holds {names}); add "
            "files called train*, valid* (or val*, dev*) and test*, or give one file, which is then split."
        )
    return found


def _part_number(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 10


def _part_of(source: Source, part: str) -> Source:
    bounds = _BOUNDS[part]

    def read() -> Iterator[Document]:
        return (document for document in source.read() if _part_number(document.text) in bounds)

    return Source(
        f"{source.name} ({part})", read, lambda: digest(["part", part, source.fingerprint()]), source.labelled
    )


def _check_parts(source: Source) -> None:
    """Read until each part has a document: the first few dozen, unless the source is tiny."""
    missing, count = dict(_BOUNDS), 0
    for document in source.read():
        if not document.text:
            continue
        count += 1
        number = _part_number(document.text)
        missing = {part: bounds for part, bounds in missing.items() if number not in bounds}
        if not missing:
            return
    empty = " and ".join(missing)
    raise UserError(
        f"{source.name} is too small to be split: of its {count} documents none fell in {empty}; give more "
        "documents, or a folder with files called train*, valid* and test*."
    )
