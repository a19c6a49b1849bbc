"""What is in a file of text: by its content, for names say little (`part-00000`, `a.jsonl.1`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from bilevel.data.columnar import ColumnKind
from bilevel.data.compression import PACKED_SUFFIXES
from bilevel.data.opening import Place, name_of, open_bytes, read_errors
from bilevel.data.text.lines import BYTE_ORDER_MARK
from bilevel.types import UserError

Documents = Literal["line", "file"]
Kind = Literal["text", "json", "array", "array_record"] | ColumnKind
"""Plain text, JSON lines, a numpy file, an ArrayRecord file; or Parquet and Arrow."""
FIELDED: frozenset[Kind] = frozenset({"json", "array", "array_record", "parquet", "arrow", "arrow_stream"})
"""Kinds whose records have fields."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
TEXT_SUFFIXES = (".txt", *JSON_SUFFIXES)
ARRAY_SUFFIXES = (".npy", ".npz")
PARQUET_SUFFIXES, ARROW_SUFFIXES = (".parquet",), (".arrow", ".arrows", ".feather", ".ipc")
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
RECORD_SUFFIXES = (*PARQUET_SUFFIXES, *ARROW_SUFFIXES, *ARRAY_RECORD_SUFFIXES)
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
"""What is read of a folder."""
READ = (
    "plain text and JSON lines (.txt, .jsonl, .ndjson, .json, or any name), .parquet, .arrow and .feather, .array_record, .npy "
    "and .npz; compressed with gzip, bzip2, xz or zstd"
)
"""What is read, for messages."""
_OTHER_SUFFIXES = re.compile(
    r"\.(csv|tsv|orc|avro|xlsx?|ods|tfrecords?|mds|bin|idx|pkl|pickle|pth?|safetensors|h5|hdf5|sqlite|db|duckdb|lance|tar|tgz"
    r"|zip|7z|rar|lz4|br|lzma|sz|warc|pdf|docx?|epub)"
)
"""Of files that are known not to be text."""
_MAGIC: dict[bytes, Kind] = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow_stream",
    b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f": "array_record",
}  # fmt: skip
_OLD_FEATHER = b"FEA1"
_SHARD = re.compile(r"-\d+-of-\d+$")
_SAMPLE = 1 << 16
_MOST_ZEROS = 0.01
"""Share of zero bytes of what is text: archives and UTF-16 have more."""
_STRING = rb'"(?:[^"\\]|\\.)*"'
_OBJECT = re.compile(rb"\{\s*" + _STRING + rb"\s*:")
_CELL = re.compile(rb"[a-z0-9_. -]{0,30}")
_AS_JSON = "write the column with the text as JSON lines"
_ARRAY = re.compile(rb"\[\s*(?:\{\s*(?:\}|" + _STRING + rb"\s*:)|\n\s*(?:" + _STRING + rb"|\[))")


def suffix_of(place: Place) -> str:
    """Return the suffix in lower case, without that of a compressed file and the number of a shard (-00000-of-00001)."""
    name = name_of(place).lower()
    packed = next((suffix for suffix in PACKED_SUFFIXES if name.endswith(suffix)), "")
    return Path(_SHARD.sub("", name.removesuffix(packed))).suffix


def kind_of(place: Place, documents: Documents = "line") -> Kind:
    """Return what is in a file. Its first 64 KiB are read, if its name does not say that it is a numpy file.

    Args:
        place: the file.
        documents: "file" takes JSON that is not lines, such as a settings file, as plain text.

    Raises:
        UserError: the file is of a kind that is not read, or is JSON but not JSON lines.
    """
    suffix = suffix_of(place)
    if suffix in ARRAY_SUFFIXES:
        return "array"
    if _OTHER_SUFFIXES.fullmatch(suffix):
        raise UserError(
            f"{place} is a {suffix} file, which is not read: read are {READ}. Convert it, or, if its lines are the documents, "
            "call it .txt."
        )
    begin = _begin(place)
    if kind := _kind_of_records(begin, suffix, place):
        return kind
    sample, named = _checked_sample(begin, place), suffix in JSON_SUFFIXES
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


def _begin(place: Place) -> bytes:
    with read_errors(place), open_bytes(place) as file:
        return file.read(_SAMPLE)


def _kind_of_records(begin: bytes, suffix: str, place: Place) -> Kind | None:
    """Return the kind of a Parquet, Arrow or ArrayRecord file, by its first bytes, else by its name."""
    if begin.startswith(_OLD_FEATHER):
        raise UserError(
            f"{place} is a Feather file of version 1, which is not read: write it again as version 2 or as .parquet."
        )
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            return kind
    if suffix in PARQUET_SUFFIXES:
        return "parquet"
    if suffix in ARROW_SUFFIXES:
        return "arrow_stream"
    return "array_record" if suffix in ARRAY_RECORD_SUFFIXES else None


def _checked_sample(sample: bytes, place: Place) -> bytes:
    """Return the first bytes of a file, if they are text."""
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{place} is UTF-16, and not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8.")
    if sample.count(0) > _MOST_ZEROS * len(sample):
        suffix = suffix_of(place)
        raise UserError(
            f"{place} is not UTF-8 text (byte {sample.index(0) + 1} is zero, and {sample.count(0)} of the first {len(sample)})"
            f"{f', and {suffix} files are not read' if suffix not in TEXT_SUFFIXES and suffix else ''}: read are {READ}. "
            "Unpack or convert it, or omit it."
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
