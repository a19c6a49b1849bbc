"""The specific data: three disjoint parts, one to learn the weights from, one to choose by, one to report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from bilevel.data.digests import Document, Source, digest, text_hash
from bilevel.data.notes import note, some
from bilevel.data.opening import Place, is_folder, name_of, place_of
from bilevel.data.text.files import note_copies, source_of_files, text_files
from bilevel.data.text.prompts import prompted
from bilevel.data.text.python import topics_parts
from bilevel.data.text.saved import inside, saved_splits
from bilevel.data.text.sources import open_source
from bilevel.types import UserError

PARTS = ("train", "valid", "test")
_WORDS = {"train": "train", "valid": "valid|validation|val|dev", "test": "test"}
_NAMED = {part: re.compile(rf"({words})(?![^\W\d_])", re.IGNORECASE) for part, words in _WORDS.items()}
"""What names of files begin with: whole words, so that `value.txt` and `training.txt` are no parts."""
_TENTHS = 10
_BOUNDS = {"train": range(8), "valid": range(8, 9), "test": range(9, 10)}


def named_part(name: str) -> str | None:
    """Return the part that the name of a file says, if it says one."""
    return next((part for part in PARTS if _NAMED[part].match(name)), None)


def open_specific(
    spec: str,
    *,
    field: str | None = None,
    documents: Literal["line", "file"] = "line",
    prompt: str | None = None,
) -> dict[str, Source]:
    """Open specific data as three disjoint parts.

    A folder whose text files are called train, valid (or validation, val, dev) and test gives those. A name may go on behind
    the word, but not with a letter: `train-00.txt` is a part, `training.txt` is none, and what is in no part is named on stderr.
    `python:topics` is split by topic. Everything else is split by its text: the 64-bit BLAKE2b hash of a document modulo 10
    puts it in train (0 to 7), valid (8) or test (9). So equal documents fall in one part, and a document
    keeps its part when others come or go.

    Args:
        spec: as for `open_source`.
        field: as for `open_source`.
        documents: as for `open_source`.
        prompt: as for `open_source`.

    Returns:
        The sources of `train`, `valid` and `test`, in this order.

    Raises:
        UserError: a part is missing or empty, or as `open_source`.
    """
    if spec == "python:topics" and field is None and prompt is None and documents == "line":
        return topics_parts()
    folder = place_of(spec)
    named = _named_parts(folder) if is_folder(folder) else {}
    if named:

        def opened(part: str, field: str | None, blank_files: bool = False) -> Source:
            return source_of_files(f"{spec} ({part})", named[part], field, documents, blank_files)

        if prompt is None:
            return {part: opened(part, field) for part in named}
        return {part: prompted(opened(part, field), opened(part, prompt, blank_files=True)) for part in named}
    source = open_source(spec, field=field, documents=documents, prompt=prompt)
    _check_parts(source)
    return {part: _part_of(source, part) for part in PARTS}


def _parts_of_saved(folder: Place, splits: list[str]) -> dict[str, list[Place]]:
    """Return the files of the splits of a `DatasetDict` that Hugging Face `datasets` saved."""
    chosen = {part: next((name for name in splits if named_part(name) == part), None) for part in PARTS}
    if missing := [part for part, name in chosen.items() if name is None]:
        raise UserError(
            f"{folder} is a saved data set with the splits {', '.join(splits)}, and none for {' and '.join(missing)}: name one, "
            f"as in {folder}/{splits[0]}, which is then split."
        )
    if unused := [name for name in splits if name not in chosen.values()]:
        note(f"of the splits of {folder} are not used: {some(unused)}.")
    return {part: text_files(inside(folder, str(name)))[0] for part, name in chosen.items()}


def _named_parts(folder: Place) -> dict[str, list[Place]]:
    if splits := saved_splits(folder):
        return _parts_of_saved(folder, splits)
    files, others = text_files(folder)
    found = {part: [f for f in files if _NAMED[part].match(name_of(f))] for part in PARTS}
    if not any(found.values()):
        return {}
    missing = [part for part in PARTS if not found[part]]
    if missing:
        names = ", ".join(map(name_of, files))
        raise UserError(
            f"The folder {folder} holds no text file for {' and '.join(missing)} (it holds {names}); add "
            "files called train, valid (or val, dev) and test, or give one file, which is then split."
        )
    used = [file for part in PARTS for file in found[part]]
    unused = [*(name_of(file) for file in files if file not in used), *others]
    if unused:
        note(f"of the folder {folder} only the files called train, valid and test are used; not used: {some(unused)}.")
    note_copies(used)
    return found


def _part_of(source: Source, part: str) -> Source:
    bounds = _BOUNDS[part]

    def read() -> Iterator[Document]:
        return (document for document in source.read() if text_hash(document.text) % _TENTHS in bounds)

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
        number = text_hash(document.text) % _TENTHS
        missing = {part: bounds for part, bounds in missing.items() if number not in bounds}
        if not missing:
            return
    empty = " and ".join(missing)
    raise UserError(
        f"{source.name} is too small to be split: of its {count} documents none fell in {empty}; give more "
        "documents, or a folder with files called train, valid and test."
    )
