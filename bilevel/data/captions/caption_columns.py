"""Captioned images from tables: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bilevel.data.captions.stream import Captioned, Picture
from bilevel.data.notes import some
from bilevel.data.opening import Place, is_url
from bilevel.data.records import cell, parquet_records
from bilevel.data.streams import one_line
from bilevel.data.text.kinds import JSON_SUFFIXES, suffix_of
from bilevel.data.text.lines import json_object, line_blocks, lines_of
from bilevel.types import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", *JSON_SUFFIXES)
_AT_ONCE = 64  # rows of a Parquet file, whose images are held in memory
_KNOWN = {
    "image": (
        "image",
        "image_path",
        "image_file",
        "file_name",
        "filename",
        "filepath",
        "path",
        "file",
        "img",
        "jpg",
        "png",
    ),
    "caption": ("caption", "captions", "text", "title", "alt", "description", "sentence", "txt"),
    "class": ("class", "class_name", "label", "category"),
}
_FLAGS = {kind: f"--data.{kind}-column" for kind in _KNOWN}


class CaptionColumns(NamedTuple):
    """The names of columns, fields or features; None: the usual names."""

    image: str | None = None
    """--data.image-column"""
    caption: str | None = None
    """--data.caption-column"""
    category: str | None = None
    """--data.class-column; "": there are no classes."""


class Chosen(NamedTuple):
    """The columns that there are."""

    image: str
    caption: str | None
    category: str | None


def choose_columns(found: Collection[str], columns: CaptionColumns, where: Place) -> Chosen:
    """Choose the columns of the image, the caption and the class; one of the last two may be missing.

    Raises:
        UserError: a column that was named is not there, several could be meant, or none can.
    """
    image = _one(found, columns.image, "image", where)
    caption = _one(found, columns.caption, "caption", where)
    category = None if columns.category == "" else _one(found, columns.category, "class", where)
    if image is None or (caption is None and category is None):
        missing = "image" if image is None else "caption"
        raise UserError(
            f"{where} has no column for the {missing}, but {_some(found)}; name it with {_FLAGS[missing]}"
            + ("." if image is None else ", or that of the classes with --data.class-column.")
        )
    return Chosen(image, caption, category)


def _one(found: Collection[str], name: str | None, kind: str, where: Place) -> str | None:
    if name is not None:
        if name not in found:
            raise UserError(
                f"{where} has no column {name!r}, but {_some(found)}; name that of the {kind} with {_FLAGS[kind]}."
            )
        return name
    known = [name for name in found if name.lower() in _KNOWN[kind]]
    if len(known) > 1:
        raise UserError(
            f"{where} has the columns {known[0]!r} and {known[1]!r}; name that of the {kind} with {_FLAGS[kind]}."
        )
    return known[0] if known else None


def _some(names: Collection[str]) -> str:
    return some([repr(name) for name in names]) or "none at all"


def table_captions(path: Place, columns: CaptionColumns) -> Iterator[Captioned]:
    """Stream the rows of a table; paths of images are relative to the table's folder.

    A cell with a list of captions gives a row for each of them.
    """
    suffix = suffix_of(path)
    folder = _folder_of(path)
    if suffix == ".parquet":
        yield from _parquet(path, columns, folder)
        return
    records = _json_records(path) if suffix in JSON_SUFFIXES else _text_records(path, "\t" if suffix == ".tsv" else ",")
    chosen = None
    for number, record in records:
        chosen = chosen or choose_columns(record, columns, path)
        yield from captions_of(record, chosen, f"{path}, line {number}", folder)


def _parquet(path: Place, columns: CaptionColumns, folder: Place) -> Iterator[Captioned]:
    chosen: list[Chosen] = []

    def choose(schema: Any) -> list[str]:
        chosen.append(choose_columns(schema.names, columns, path))
        return [name for name in dict.fromkeys(chosen[0]) if name is not None]

    for number, record in enumerate(parquet_records(path, choose, at_once=_AT_ONCE)):
        yield from captions_of(record, chosen[0], f"{path}, row {number}", folder)


def _json_records(path: Place) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            yield number, json_object(line, f"{path}, line {number}")


def _text_records(path: Place, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Stream the lines of a CSV or TSV file, whose first line names the columns; quotes mean nothing in a TSV file."""
    text = (line.decode("utf-8") for block in line_blocks(path) for line in block)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=delimiter == ",")
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path} has several columns called {double!r}; rename them, in the first line.")
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}, line {rows.line_num}: there are {len(cells)} cells, but {len(names)} in the first line; "
                    "put texts with commas in quotes, or leave the line out."
                )
            yield rows.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not a row of a table ({error}); correct the line.") from error


def captions_of(record: Mapping[str, Any], chosen: Chosen, where: str, folder: Place | None) -> Iterator[Captioned]:
    """Read a record: one item for each caption.

    Args:
        record: by column; a caption may be a list, an image a path, bytes, pixels or `{"bytes": …, "path": …}`.
        chosen: the columns.
        where: for messages.
        folder: what paths are relative to; None: there are no paths.

    Raises:
        UserError: a value is of another kind.
    """
    picture = _picture(cell(record, chosen.image), chosen.image, where, folder)
    category = "" if chosen.category is None else _category(cell(record, chosen.category), chosen.category, where)
    values = "" if chosen.caption is None else cell(record, chosen.caption)
    texts = list(values) if isinstance(values, list | tuple | np.ndarray) else [values]
    for text in texts or [""]:
        yield Captioned(where, picture, _text(text, chosen.caption or "", where), category)


def _picture(value: Any, name: str, where: str, folder: Place | None) -> Picture | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8:
        return value
    if isinstance(value, str) and folder is not None:
        return beside(folder, value.strip())
    raise UserError(
        f"{where}: {name!r} holds {_kind(value)} instead of an image; name the column of the images with --data.image-column."
    )


def beside(folder: Place, name: str) -> Place:
    """Return a path relative to a folder, or a URL or an absolute path as it is."""
    if is_url(name):
        return name
    return f"{folder}/{name}" if isinstance(folder, str) else folder / name


def _folder_of(path: Place) -> Place:
    return path.rpartition("/")[0] if isinstance(path, str) else path.parent


def _category(value: Any, name: str, where: str) -> str:
    if isinstance(value, bytes | str):
        return one_line(value.decode("utf-8") if isinstance(value, bytes) else value)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(
            f"{where}: {name!r} holds {_kind(value)} instead of a class; name the column of the classes with --data.class-column."
        )
    return str(int(value))


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: the caption is not UTF-8 (byte {error.start + 1}); correct it.") from error
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name!r} holds {_kind(value)} instead of a caption; name the column of the captions with "
            "--data.caption-column."
        )
    return one_line(value)


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
