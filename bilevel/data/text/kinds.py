"""What is in a file of text: by its content, for names say little (`part-00000`, `a.jsonl.1`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from bilevel.data.opening import PACKED_SUFFIXES, Place, name_of, open_bytes, read_errors
from bilevel.types import UserError

Documents = Literal["line", "file"]
Kind = Literal["text", "json", "array"]
"""Plain text, JSON lines, or a numpy file."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
TEXT_SUFFIXES = (".txt", *JSON_SUFFIXES)
ARRAY_SUFFIXES = (".npy", ".npz")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx")
_SAMPLE = 1 << 16
_MOST_ZEROS = 0.01
"""Share of zero bytes of what is text: archives and UTF-16 have more."""
_STRING = rb'"(?:[^"\\]|\\.)*"'
_OBJECT = re.compile(rb"\{\s*" + _STRING + rb"\s*:")
_CELL = re.compile(rb"[a-z0-9_. -]{0,30}")
_AS_JSON = "write the column with the text as JSON lines"
_ARRAY = re.compile(rb"\[\s*(?:\{\s*(?:\}|" + _STRING + rb"\s*:)|\n\s*(?:" + _STRING + rb"|\[))")


def suffix_of(place: Place) -> str:
    """Return the suffix in lower case, without that of a compressed file."""
    name = name_of(place).lower()
    packed = next((suffix for suffix in PACKED_SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(packed)).suffix


def kind_of(place: Place, documents: Documents = "line") -> Kind:
    """Return what is in a file. Its first 64 KiB are read, if its name does not say that it is a numpy file.

    Args:
        place: the file.
        documents: "file" takes JSON that is not lines, such as a settings file, as plain text.

    Raises:
        UserError: the file is neither text nor a numpy file, or is JSON but not JSON lines.
    """
    suffix = suffix_of(place)
    if suffix in ARRAY_SUFFIXES:
        return "array"
    if suffix in _TABLE_SUFFIXES:
        raise UserError(
            f"{place} is a table, and not text: {_AS_JSON}, or, if its lines are the documents, call it .txt."
        )
    sample, named = _sample(place), suffix in JSON_SUFFIXES
    if documents == "line":
        _check_lines(sample, place)
    found = _structure(sample.removeprefix(BYTE_ORDER_MARK).lstrip(), several=documents == "file" and not named)
    if found == "lines" or (named and found != "other"):
        return "json"
    if found == "other" and (named or documents == "line"):
        raise UserError(
            f"{place} holds JSON, but not an object a line: write one object a line, as `jq -c '.[]'` does with the objects of "
            "an array."
        )
    return "text"


def _sample(place: Place) -> bytes:
    """Return the first bytes of a file, if they are text."""
    with read_errors(place), open_bytes(place) as file:
        sample = file.read(_SAMPLE)
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{place} is UTF-16, and not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8.")
    if sample.count(0) > _MOST_ZEROS * len(sample):
        raise UserError(
            f"{place} is not UTF-8 text (byte {sample.index(0) + 1} is zero, and {sample.count(0)} of the first {len(sample)}): "
            "unpack or convert it, or omit it."
        )
    return sample


def _check_lines(sample: bytes, place: Place) -> None:
    """Refuse lines that do not end as such, and those of a table with a column called text."""
    if b"\n" not in sample and b"\r" in sample.rstrip(b"\r"):
        raise UserError(f"The lines of {place} end with CR alone: convert it, for example with tr '\\r' '\\n'.")
    header = sample.removeprefix(BYTE_ORDER_MARK).partition(b"\n")[0].strip().lower()
    cells = [cell.strip(b' "') for cell in re.split(rb"[,;\t]", header)]
    if len(cells) > 1 and b"text" in cells and all(_CELL.fullmatch(cell) for cell in cells):
        raise UserError(f"{place} is a table, and not text (it begins with {header.decode()!r}): {_AS_JSON}.")


def _structure(text: bytes, *, several: bool) -> Literal["lines", "other", ""]:
    """Return whether the beginning of a text is that of JSON lines, of other JSON, or of neither.

    Args:
        text: without white space in front.
        several: one object alone is not JSON lines.
    """
    line, end, rest = text.partition(b"\n")
    value, rest = _parsed(line), rest.lstrip()
    if isinstance(value, dict):
        return "lines" if not several or rest.startswith(b"{") else "other"
    if isinstance(value, list) and (not rest or isinstance(_parsed(rest.partition(b"\n")[0]), list)):
        return "other"
    if _OBJECT.match(text):
        return "other" if end else "lines"  # a line longer than the sample
    return "other" if _ARRAY.match(text) else ""


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
