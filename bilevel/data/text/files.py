"""Text files and JSON lines, compressed or not."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
from bilevel.data.text.kinds import (
    ARRAY_SUFFIXES,
    BYTE_ORDER_MARK,
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    Documents,
    Kind,
    kind_of,
    suffix_of,
)
from bilevel.types import UserError

_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_FOLDER_KINDS = ".txt, .jsonl or .json files (.gz or not)"


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
    key = field or "text"

    def read() -> Iterator[Document]:
        all_blank = True
        for path, kind in zip(paths, kinds, strict=True):
            blank = True
            for text in _documents(path, kind, key, documents):
                blank = blank and not text
                yield Document(text)
            if blank and not may_be_blank:
                raise UserError(f"The file {path} holds no text; give a file with text in it.")
            all_blank = all_blank and blank
        if all_blank and not blank_files:
            raise UserError(f"None of the {len(paths)} files of {name} holds text; give files with text in them.")

    def lines() -> Iterator[list[bytes]]:
        for path in paths:
            yield from line_blocks(path)

    in_lines = documents == "line" and "array" not in kinds
    return Source(
        name,
        read,
        lambda: digest(["files", key, documents, *kinds, *map(file_fingerprint, paths)]),
        paths=tuple(paths),
        lines=lines if in_lines else None,
    )


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
    """Return the text and JSON-lines files directly in `folder`, sorted by name, and the names of its other entries.

    Hidden entries do not count.

    Raises:
        UserError: the folder cannot be read.
    """
    found, others = [], []
    for place in entries_in(folder):
        if is_plain_file(place) and suffix_of(place) in TEXT_SUFFIXES:
            found.append(place)
        else:
            others.append(name_of(place) + ("/" if is_folder(place) else ""))
    return found, others


def options_of_files(spec: str) -> Options:
    """Which options of `open_source` the files that `spec` names have a use for."""
    fielded = [suffix_of(path) in ARRAY_SUFFIXES + JSON_SUFFIXES or _has_fields(path) for path in expand(spec)]
    return Options(field=any(fielded), documents=not all(fielded))


def _has_fields(path: Place) -> bool:
    return size_of(path) != 0 and kind_of(path) == "json"


def _checked_kind(path: Place, field: str | None, documents: Documents, may_be_blank: bool) -> Kind:
    suffix = suffix_of(path)
    if isinstance(path, Path) and not os.access(path, os.R_OK):
        raise UserError(f"The file {path} cannot be read; change its permissions.")
    if size_of(path) == 0 and (suffix in ARRAY_SUFFIXES or not may_be_blank):
        raise UserError(f"The file {path} is empty; give a file with text in it, or leave this one out.")
    kind = kind_of(path, documents)
    if kind != "text" or suffix in JSON_SUFFIXES:
        if documents == "file":
            raise UserError(
                f"{path} holds one document a line or row; documents='file' ({DOCUMENTS}) is for plain text only."
            )
    elif field is not None:
        raise UserError(
            f"field={field!r} ({FIELD}) names a field of JSON lines, but {path} is plain text; leave the field out."
        )
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


def _documents(path: Place, kind: Kind, field: str, documents: Documents) -> Iterator[bytes]:
    if kind == "array":
        yield from array_documents(path, field)
        return
    if documents == "file":
        text = b"".join(line for block in line_blocks(path) for line in block)
        yield text if text.strip() else b""
        return
    number = 0
    for block in line_blocks(path):
        for line in block:
            number += 1
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            if kind == "json" and text.strip():
                text = _json_text(text, field, path, number)
            yield text if text.strip() else b""


def line_blocks(path: Place) -> Iterator[list[bytes]]:
    """Stream the lines of a file, line ends included, in lists of about 1 MiB, checked to be UTF-8.

    Raises:
        UserError: the file cannot be read, is compressed and broken, or a line is not UTF-8.
    """
    with open_bytes(path) as stream:
        before = 0
        while block := _next_block(stream, path):
            if before == 0:
                block[0] = block[0].removeprefix(BYTE_ORDER_MARK)
            _check_utf8(block, path, before)
            before += len(block)
            yield block


def lines_of(path: Place) -> Iterator[str]:
    """Stream the lines of a file without their ends."""
    return (line.rstrip(b"\r\n").decode("utf-8") for block in line_blocks(path) for line in block)


def _next_block(stream: BinaryIO, path: Place) -> list[bytes]:
    with read_errors(path):
        return stream.readlines(_BLOCK)


def _check_utf8(lines: list[bytes], path: Place, before: int) -> None:
    try:
        b"".join(lines).decode("utf-8")
    except UnicodeDecodeError:
        for number, line in enumerate(lines, start=before + 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) "
                    "is not UTF-8; convert the file to UTF-8 (for example with iconv) or remove the line."
                ) from error


def json_object(line: bytes | str, where: str) -> dict[str, Any]:
    """Read the JSON object of a line; a UserError that begins with `where` says that it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); every line must hold one JSON object.") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(f"{where}: a JSON {kind} instead of an object; write one JSON object a line.")
    return record


def _json_text(line: bytes, field: str, path: Place, number: int) -> bytes:
    where = f"{path}, line {number}"
    record = json_object(line, where)
    if field not in record:
        found = ", ".join(map(repr, list(record)[:20])) or "none"
        raise UserError(
            f"{where}: no field {field!r}; the fields found are: {found}; name the text with field=... ({FIELD})."
        )
    text = record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(
            f"{where}: the field {field!r} holds a {kind} instead of a string; name the text with field=... ({FIELD})."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field {field!r} holds half a surrogate pair at character {error.start + 1}; "
            "remove it or write the whole character."
        ) from error
