"""Text files and JSON lines, compressed with gzip or not."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from bilevel.data.digests import Document, Options, Source, digest
from bilevel.data.opening import (
    Place,
    exists,
    files_in,
    has_magic,
    is_folder,
    is_url,
    matching,
    name_of,
    open_bytes,
    place_of,
    remote_errors,
    size_of,
    stamp_of,
)
from bilevel.data.text.array_text import array_documents
from bilevel.types import UserError

Documents = Literal["line", "file"]

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", *JSON_SUFFIXES)
ARRAY_SUFFIXES = (".npy", ".npz")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_FOLDER_KINDS = ".txt, .jsonl or .json files (.gz or not)"


def files_source(spec: str, field: str | None, documents: Documents, blank_files: bool = False) -> Source:
    """The source made of the files that `spec` names (see `open_source`)."""
    return source_of_files(spec, expand(spec), field, documents, blank_files)


def source_of_files(
    name: str, paths: list[Place], field: str | None, documents: Documents, blank_files: bool = False
) -> Source:
    """The source called `name` that reads `paths` one after another."""
    may_be_blank = blank_files or (documents == "file" and len(paths) > 1)
    for path in paths:
        _check_kind(path, field, documents, may_be_blank)
    key = field or "text"

    def read() -> Iterator[Document]:
        all_blank = True
        for path in paths:
            blank = True
            for text in _documents(path, key, documents):
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

    in_lines = documents == "line" and all(kind_of(path) not in ARRAY_SUFFIXES for path in paths)
    return Source(
        name,
        read,
        lambda: digest(["files", key, documents, *map(file_fingerprint, paths)]),
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
    return found


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
        found = text_files(place)
        if not found:
            raise UserError(f"The folder {name} holds no {_FOLDER_KINDS}; name the files, or a glob that matches them.")
        return found
    if not exists(place):
        where = "address" if is_url(place) else f"path (it is taken relative to {Path.cwd()})"
        raise UserError(f"The file {name} does not exist; check the {where}.")
    return [place]


def text_files(folder: Place) -> list[Place]:
    """Return the text and JSON-lines files directly in `folder`, sorted by name; hidden files do not count.

    Raises:
        UserError: the folder cannot be read.
    """
    return [place for place in files_in(folder) if kind_of(place) in TEXT_SUFFIXES]


def kind_of(place: Place) -> str:
    """Return the suffix in lower case that says what is in the file, without a final `.gz`."""
    name = name_of(place).lower().removesuffix(".gz")
    return Path(name).suffix


def options_of_files(spec: str) -> Options:
    """Which options of `open_source` the files that `spec` names have a use for."""
    kinds = [kind_of(path) for path in expand(spec)]
    fielded = [kind in JSON_SUFFIXES + ARRAY_SUFFIXES for kind in kinds]
    return Options(field=any(fielded), documents=not all(fielded))


def _check_kind(path: Place, field: str | None, documents: Documents, may_be_blank: bool) -> None:
    kind = kind_of(path)
    if isinstance(path, Path) and not os.access(path, os.R_OK):
        raise UserError(f"The file {path} cannot be read; change its permissions.")
    if size_of(path) == 0 and (kind in ARRAY_SUFFIXES or not may_be_blank):
        raise UserError(f"The file {path} is empty; give a file with text in it, or leave this one out.")
    if kind in JSON_SUFFIXES + ARRAY_SUFFIXES:
        if documents == "file":
            raise UserError(f"{path} holds one document a line or row; documents='file' is for plain text only.")
    elif field is not None:
        raise UserError(f"field={field!r} names a field of JSON lines, but {path} is plain text; leave the field out.")


def file_fingerprint(path: Place, *, times: bool = True) -> str:
    """Return a digest that notices a changed file and reads at most 1 MiB of it; see `Source.fingerprint`.

    Args:
        path: the file.
        times: whether the modification time of a large file counts, which copies of a file need not share.
    """
    name, size = name_of(path), size_of(path)
    if size is None:
        return digest([name, stamp_of(path)])
    with open_bytes(path, decompress=False) as file, remote_errors(path):
        if size <= _BLOCK:
            return digest([name, file.read()])
        samples = []
        for position in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            file.seek(position)
            samples.append(file.read(_SAMPLE))
    return digest([name, size, *([stamp_of(path)] if times else ()), *samples])


def _documents(path: Place, field: str, documents: Documents) -> Iterator[bytes]:
    if kind_of(path) in ARRAY_SUFFIXES:
        yield from array_documents(path, field)
        return
    if documents == "file":
        text = b"".join(line for block in line_blocks(path) for line in block)
        yield text if text.strip() else b""
        return
    number = 0
    is_json = kind_of(path) in JSON_SUFFIXES
    for block in line_blocks(path):
        for line in block:
            number += 1
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            if is_json and text.strip():
                text = _json_text(text, field, path, number)
            yield text if text.strip() else b""


def line_blocks(path: Place) -> Iterator[list[bytes]]:
    """Stream the lines of a file, line ends included, in lists of about 1 MiB, checked to be UTF-8.

    Raises:
        UserError: the gzip stream is broken, or a line is not UTF-8.
    """
    with open_bytes(path) as stream:
        before = 0
        while block := _next_block(stream, path):
            if before == 0:
                block[0] = block[0].removeprefix(_BYTE_ORDER_MARK)
            _check_utf8(block, path, before)
            before += len(block)
            yield block


def _next_block(stream: BinaryIO, path: Place) -> list[bytes]:
    with remote_errors(path):
        try:
            return stream.readlines(_BLOCK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path} is not a complete gzip file ({error}); copy or compress it again, "
                "or remove .gz from its name if it is not compressed."
            ) from error


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


def _json_text(line: bytes, field: str, path: Place, number: int) -> bytes:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); every line must hold one JSON object.") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(f"{where}: a JSON {kind} instead of an object; write one JSON object a line.")
    if field not in record:
        found = ", ".join(map(repr, list(record)[:20])) or "none"
        raise UserError(f"{where}: no field {field!r}; the fields found are: {found}; name the text with field=...")
    text = record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(
            f"{where}: the field {field!r} holds a {kind} instead of a string; name the text with field=..."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field {field!r} holds half a surrogate pair at character {error.start + 1}; "
            "remove it or write the whole character."
        ) from error
