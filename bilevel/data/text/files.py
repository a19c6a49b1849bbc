"""Files of documents: which ones a specification names, and the source made of them."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bilevel.data.digests import DOCUMENTS, FIELD, Document, Options, Source, digest
from bilevel.data.notes import note, some
from bilevel.data.opening import (
    Place,
    entries_in,
    exists,
    has_magic,
    identity_of,
    is_folder,
    is_plain_file,
    is_url,
    matching,
    name_of,
    open_bytes,
    place_of,
    read_errors,
    size_of,
    stamp_of,
)
from bilevel.data.text.array_text import array_documents
from bilevel.data.text.column_file import ColumnFile
from bilevel.data.text.fields import DEFAULT, field_names
from bilevel.data.text.kinds import (
    ARRAY_SUFFIXES,
    FIELDED,
    FOLDER_SUFFIXES,
    JSON_SUFFIXES,
    RECORD_SUFFIXES,
    Documents,
    Kind,
    kind_of,
    suffix_of,
)
from bilevel.data.text.line_file import LineFile
from bilevel.data.text.lines import line_blocks
from bilevel.data.text.record_file import RecordFile
from bilevel.data.text.saved import saved_files, saved_splits
from bilevel.data.text.stored import Stored
from bilevel.types import UserError

_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_FOLDER_KINDS = ".txt, .jsonl, .json, .parquet, .arrow or .array_record files (compressed or not)"


def files_source(spec: str, field: str | None, documents: Documents, blank_files: bool = False) -> Source:
    """The source made of the files that `spec` names (see `open_source`)."""
    paths = expand(spec)
    note_copies(paths)
    return source_of_files(spec, paths, field, documents, blank_files)


def source_of_files(
    name: str, paths: list[Place], field: str | None, documents: Documents, blank_files: bool = False
) -> Source:
    """The source called `name` that reads `paths` one after another."""
    may_be_blank = blank_files or (documents == "file" and len(paths) > 1)
    kinds: list[Kind] = [_checked_kind(path, field, documents, may_be_blank) for path in paths]

    def read() -> Iterator[Document]:
        all_blank = True
        for path, kind in zip(paths, kinds, strict=True):
            blank = True
            for text in _documents(path, kind, field, documents):
                blank = blank and not text
                yield Document(text)
            if blank and not may_be_blank:
                raise UserError(f"The file {path} holds no text; give a file with text in it.")
            all_blank = all_blank and blank
        if all_blank and not blank_files:
            raise UserError(f"None of the {len(paths)} files of {name} holds text; give files with text in them.")

    alone = kinds[0] if len(kinds) == 1 and documents == "line" else "array"
    return Source(
        name,
        read,
        lambda: digest(["files", field or DEFAULT, documents, *kinds, *map(file_fingerprint, paths)]),
        paths=tuple(paths),
        stored=None if alone == "array" else stored_file(paths[0], alone),
    )


def stored_file(path: Place, kind: Kind) -> Stored:
    """Return what reads and writes the records of a file that is no numpy file."""
    if kind == "text" or kind == "json":
        return LineFile(path, kind)
    if kind == "array_record":
        return RecordFile(path)
    assert kind != "array"
    return ColumnFile(path, kind)


def expand(spec: str) -> list[Place]:
    """Return the files that `spec` names: a file, a folder, a glob, or several of these separated by commas.

    Raises:
        UserError: something does not exist, matches no file, or is named twice.
    """
    # A name that exists is taken as it is, even with a comma or a bracket in it.
    # os.path, unlike pathlib, also answers for what is too long to be one name: many names separated by commas.
    names = [spec] if os.path.exists(os.path.expanduser(spec)) else [name.strip() for name in spec.split(",")]
    found = [path for name in names for path in _expand_one(name, spec)]
    places = [path if is_url(path) else os.path.abspath(path) for path in found]
    if len(set(places)) < len(places):
        double = next(path for i, path in enumerate(found) if places[i] in places[:i])
        raise UserError(f"The file {double} is named twice; name it once.")
    known: dict[tuple[int, int] | str, Place] = {}
    for path in found:
        if (other := known.setdefault(identity_of(path), path)) is not path:
            raise UserError(f"{other} and {path} are one file, by a link; name it once, or remove the link.")
    return found


def note_copies(paths: Sequence[Place]) -> None:
    """Say which local files hold the same, byte for byte: their documents count twice."""
    first: dict[tuple[int, bytes], Path] = {}
    copies: list[str] = []
    sizes = [path.stat().st_size if isinstance(path, Path) else 0 for path in paths]
    count = Counter(sizes)
    for path, size in zip(paths, sizes, strict=True):
        if size and count[size] > 1 and isinstance(path, Path) and os.access(path, os.R_OK):
            with path.open("rb") as file:
                key = (size, hashlib.blake2b(file.read(_SAMPLE), digest_size=16).digest())
            other = first.setdefault(key, path)
            if other is not path and filecmp.cmp(other, path, shallow=False):
                copies.append(f"{path} is a copy of {other}")
    if copies:
        note(f"{some(copies)}; the documents count twice.")


def _expand_one(name: str, spec: str) -> list[Place]:
    if not name:
        raise UserError(f"The data specification {spec!r} holds an empty name; write file names separated by commas.")
    place = place_of(name)
    if not is_url(place) and os.path.exists(place) and not os.path.isdir(place):
        return [place]
    if has_magic(name) and not os.path.exists(place):
        found = matching(name)
        if not found:
            raise UserError(f"No file matches {name}; check the pattern and the folder it starts from.")
        return found
    if is_folder(place):
        found, others = text_files(place)
        if not found:
            raise UserError(f"The folder {name} holds no {_FOLDER_KINDS}; name the files, or a glob that matches them.")
        if others:
            note(f"of the folder {name} are not read: {some(others)}; name files, or a glob that matches them.")
        return found
    if not exists(place):
        where = "address" if is_url(place) else f"path (it is taken relative to {Path.cwd()})"
        raise UserError(f"The file {name} does not exist; check the {where}.")
    return [place]


def text_files(folder: Place) -> tuple[list[Place], list[str]]:
    """Return the files of documents directly in `folder`, sorted by name, and the names of its other entries.

    Hidden entries do not count. Of a folder that Hugging Face `datasets` saved, return its Arrow files alone.

    Raises:
        UserError: the folder cannot be read.
    """
    if (saved := saved_files(folder)) is not None:
        return saved, []
    found, others = [], []
    for place in entries_in(folder):
        if is_plain_file(place) and suffix_of(place) in FOLDER_SUFFIXES:
            found.append(place)
        else:
            others.append(name_of(place) + ("/" if is_folder(place) else ""))
    return found, others


def options_of_files(spec: str) -> Options:
    """Which options of `open_source` the files that `spec` names have a use for."""
    folder = place_of(spec)
    if is_folder(folder) and saved_splits(folder):
        return Options(field=True, documents=False)
    named = ARRAY_SUFFIXES + JSON_SUFFIXES + RECORD_SUFFIXES
    fielded = [suffix_of(path) in named or _has_fields(path) for path in expand(spec)]
    return Options(field=any(fielded), documents=not all(fielded))


def _has_fields(path: Place) -> bool:
    return size_of(path) != 0 and kind_of(path) in FIELDED


def _checked_kind(path: Place, field: str | None, documents: Documents, may_be_blank: bool) -> Kind:
    suffix = suffix_of(path)
    if isinstance(path, Path) and not os.access(path, os.R_OK):
        raise UserError(f"The file {path} cannot be read; change its permissions.")
    if size_of(path) == 0 and (suffix in ARRAY_SUFFIXES + RECORD_SUFFIXES or not may_be_blank):
        raise UserError(f"The file {path} is empty; give a file with text in it, or leave this one out.")
    field_names(field)
    kind = kind_of(path, documents)
    if kind != "text" or suffix in JSON_SUFFIXES:
        if documents == "file":
            raise UserError(
                f"{path} holds one document a line or row; documents='file' ({DOCUMENTS}) is for plain text only."
            )
    elif field is not None:
        raise UserError(f"field={field!r} ({FIELD}) names a field, but {path} is plain text; leave the field out.")
    return kind


def file_fingerprint(path: Place, *, times: bool = True) -> str:
    """Return a digest that notices a changed file and reads at most 1 MiB of it; see `Source.fingerprint`.

    Args:
        path: the file.
        times: whether the modification time of a large file counts, which copies of a file need not share.
    """
    name, size = name_of(path), size_of(path)
    if size is None:
        return digest([name, stamp_of(path)])
    with open_bytes(path, decompress=False) as file, read_errors(path):
        if size <= _BLOCK:
            return digest([name, file.read()])
        samples = []
        for position in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            file.seek(position)
            samples.append(file.read(_SAMPLE))
    return digest([name, size, *([stamp_of(path)] if times else ()), *samples])


def _documents(path: Place, kind: Kind, field: str | None, documents: Documents) -> Iterator[bytes]:
    if kind == "array":
        yield from array_documents(path, field or DEFAULT)
    elif documents == "file":
        text = b"".join(line for block in line_blocks(path) for line in block)
        yield text if text.strip() else b""
    else:
        yield from stored_file(path, kind).texts(field)
