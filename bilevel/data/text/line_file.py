"""Plain text and JSON lines as they are stored: line i is record i."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bilevel.data.compression import PACKED_SUFFIXES, Compression, compressing
from bilevel.data.opening import Place, compression_of
from bilevel.data.text.fields import DEFAULT, field_names, record_key, record_text
from bilevel.data.text.lines import json_object, line_blocks
from bilevel.data.text.stored import ID_FIELD, Chosen
from bilevel.types import UserError


class LineFile:
    """A file of plain text or JSON lines."""

    def __init__(self, path: Place, kind: Literal["text", "json"]):
        self._path, self._kind = path, kind

    def texts(self, field: str | None) -> Iterator[bytes]:
        """Stream the text of each line."""
        return self._json_texts(field_names(field)) if self._kind == "json" else self._lines()

    def _lines(self) -> Iterator[bytes]:
        for block in line_blocks(self._path):
            for line in block:
                yield line.removesuffix(b"\n").removesuffix(b"\r") if line.strip() else b""

    def _json_texts(self, names: Sequence[str]) -> Iterator[bytes]:
        first = True
        with contextlib.closing(line_blocks(self._path)) as blocks:
            for number, line in enumerate(chain.from_iterable(blocks), start=1):
                if line.strip():
                    where = f"{self._path}, line {number}"
                    yield record_text(json_object(line, where), names, where, first=first)
                    first = False
                else:
                    yield b""

    def fields(self) -> list[str]:
        """Return the names in the first JSON object, or the one that plain text gets."""
        if self._kind == "text":
            return [DEFAULT]
        lines = (
            (i, line) for i, line in enumerate(chain.from_iterable(line_blocks(self._path)), start=1) if line.strip()
        )
        number, line = next(lines, (1, b"{}"))
        return list(json_object(line, f"{self._path}, line {number}"))

    def keys(self, field: str | None, flag: str = ID_FIELD) -> Iterator[Any]:
        """Stream the values of a field of JSON lines, None for a blank line; or the numbers of the lines."""
        if field is not None and self._kind == "text":
            raise UserError(f"{flag} {field} names a field, but {self._path} is plain text; leave {flag} out.")
        start = 0
        with contextlib.closing(line_blocks(self._path)) as blocks:
            for block in blocks:
                yield np.arange(start, start + len(block)) if field is None else self._keys(block, field, start, flag)
                start += len(block)

    def _keys(self, block: list[bytes], field: str, start: int, flag: str) -> list[str | int | None]:
        found: list[str | int | None] = []
        for number, line in enumerate(block, start=start + 1):
            where = f"{self._path}, line {number}"
            found.append(record_key(json_object(line, where), field, where, flag) if line.strip() else None)
        return found

    def name(self, stem: str, *, plain: bool) -> str:
        """Return the name of a file like this one; of plain text with fields of ours: of JSON lines."""
        if plain or self._kind == "json":
            return stem
        packed = next((suffix for suffix in PACKED_SUFFIXES if stem.lower().endswith(suffix)), "")
        return f"{stem.removesuffix(stem[len(stem) - len(packed) :])}.jsonl{packed}"

    def write(self, target: Path, chosen: Chosen) -> Iterator[int]:
        """Write the original lines; with weights, as JSON lines."""
        start = 0
        with (
            compressing(target, compression_of(self._path)) as out,
            contextlib.closing(line_blocks(self._path)) as blocks,
        ):
            for block in blocks:
                kept, weights = chosen.of(start, len(block))
                lines = list(compress(block, kept))
                if weights is not None:
                    numbers = np.flatnonzero(kept) + start + 1
                    lines = [
                        self._weighted(line, chosen.weight_field, float(weight), int(number))
                        for line, weight, number in zip(lines, weights, numbers, strict=True)
                    ]
                out.write(b"".join(line.removesuffix(b"\n") + b"\n" for line in lines))  # the last may have no end
                start += len(block)
                yield len(lines)

    def _weighted(self, line: bytes, name: str, weight: float, number: int) -> bytes:
        if self._kind == "text":
            return json_line({DEFAULT: line.rstrip(b"\r\n").decode(), name: rounded(weight)})
        return with_number(line, name, weight, f"{self._path}, line {number}")

    def write_columns(self, target: Path, blocks: Iterable[Mapping[str, Any]]) -> Iterator[int]:
        """Write JSON lines."""
        yield from write_json_lines(target, blocks, compression_of(self._path))


def write_json_lines(target: Path, blocks: Iterable[Mapping[str, Any]], kind: Compression | None) -> Iterator[int]:
    """Write JSON lines from columns; see `Stored.write_columns`."""
    with compressing(target, kind) as out:
        for block in blocks:
            lines = json_lines(block)
            out.write(b"".join(lines))
            yield len(lines)


def json_lines(block: Mapping[str, Any]) -> list[bytes]:
    """Return a line of JSON for each row of columns."""
    rows = zip(*map(_json_values, block.values()), strict=True)
    return [json_line(dict(zip(block, row, strict=True))) for row in rows]


def _json_values(values: Any) -> list[Any]:
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    kind = getattr(values, "dtype", getattr(values, "type", None))
    return list(map(rounded, found)) if str(kind) in ("float", "float32") else found


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def rounded(value: float | None) -> float | None:
    """Return the shortest decimal number that is the same in float32."""
    return None if value is None else float(f"{value:.9g}")


def with_number(line: bytes, name: str, value: float, where: str) -> bytes:
    """Add a number to the JSON object of a line, and leave the rest as it was written.

    Raises:
        UserError: it has such a field, or is no JSON object.
    """
    record, text = json_object(line, where), line.rstrip()
    if name in record:
        raise UserError(f"{where}: there is a field {name!r} already; give the weights another name (--weight-field).")
    comma = b", " if record else b""
    return text[:-1].rstrip() + comma + json.dumps({name: rounded(value)}).encode()[1:] + b"\n"
