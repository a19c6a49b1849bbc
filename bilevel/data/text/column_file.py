"""Parquet and Arrow files of documents as they are stored: row i is record i."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.data.columnar import (
    ColumnKind,
    column_batches,
    column_writer,
    need_pyarrow,
    place_in,
    row_counts,
    schema_of,
    values_at,
    write_options,
)
from bilevel.data.compression import compressing
from bilevel.data.digests import FIELD
from bilevel.data.opening import Place, compression_of
from bilevel.data.text.fields import field_names, joined
from bilevel.data.text.stored import ID_FIELD, Chosen
from bilevel.types import UserError


class ColumnFile:
    """A Parquet or Arrow file."""

    def __init__(self, path: Place, kind: ColumnKind):
        self._path = path
        self._kind: ColumnKind = kind

    def texts(self, field: str | None) -> Iterator[bytes]:
        """Stream the text of each row; what is null is blank."""
        schema, start = schema_of(self._path, self._kind), 0
        places = [place_in(schema, name, self._path, FIELD) for name in field_names(field)]
        with self._batches(places) as batches:
            for batch in batches:
                columns = [self._texts(values_at(batch, place), place, start) for place in places]
                if len(columns) == 1:
                    yield from (text if text and text.strip() else b"" for text in columns[0])
                else:
                    yield from map(joined, zip(*columns, strict=True))
                start += batch.num_rows

    def _batches(self, places: list[tuple[str, ...]]) -> contextlib.closing[Generator[Any]]:
        names = list(dict.fromkeys(".".join(place) for place in places))
        return contextlib.closing(column_batches(self._path, self._kind, lambda _: names))

    def _texts(self, values: Any, place: tuple[str, ...], start: int) -> list[bytes | None]:
        """The UTF-8 texts of a column."""
        pa = need_pyarrow(self._path)
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
        if any(is_kind(kind) for is_kind in texts):
            values = values.cast(pa.large_binary())  # no text is decoded, only to be encoded again
        elif not any(is_kind(kind) for is_kind in binary):
            name = ".".join(place)
            raise UserError(
                f"{self._path}: the column {name!r} holds {kind} instead of a text; name the text with field=... ({FIELD})."
            )
        found = values.to_pylist()
        self._check(found, start)
        return found

    def _check(self, texts: list[bytes | None], start: int) -> None:
        try:
            b"".join(text for text in texts if text).decode()
            return
        except UnicodeDecodeError:
            pass
        for number, text in enumerate(texts, start=start):
            try:
                (text or b"").decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self._path}, row {number}: byte {error.start + 1} of the text is not UTF-8; convert it, or leave "
                    "the row out."
                ) from error

    def fields(self) -> list[str]:
        """Return the names of the columns."""
        return list(schema_of(self._path, self._kind).names)

    def keys(self, field: str | None, flag: str = ID_FIELD) -> Iterator[Any]:
        """Stream the values of a column, or the numbers of the rows."""
        schema, start = schema_of(self._path, self._kind), 0
        if field is None:
            for count in row_counts(self._path, self._kind):
                yield np.arange(start, start + count)
                start += count
            return
        place = place_in(schema, field, self._path, flag)
        with self._batches([place]) as batches:
            for batch in batches:
                values = values_at(batch, place)
                if values.null_count:
                    row = start + values.is_null().to_pylist().index(True)
                    raise UserError(
                        f"{self._path}, row {row}: {field!r} is null; name a column with a value in every row ({flag})."
                    )
                yield values
                start += batch.num_rows

    def name(self, stem: str, *, plain: bool) -> str:
        """Return the same name: columns are added to a table."""
        return stem

    def write(self, target: Path, chosen: Chosen) -> Iterator[int]:
        """Write the kept rows with all their columns."""
        pa = need_pyarrow(self._path)
        schema, start = schema_of(self._path, self._kind), 0
        if chosen.weight is not None:
            if chosen.weight_field in schema.names:
                raise UserError(
                    f"{self._path} has a column {chosen.weight_field!r} already; give the weights another name (--weight-field)."
                )
            schema = schema.append(pa.field(chosen.weight_field, pa.float32()))
        options = write_options(self._path, self._kind)
        with (
            compressing(target, compression_of(self._path)) as file,
            column_writer(file, self._kind, schema, **options) as write,
        ):
            for batch in column_batches(self._path, self._kind):
                kept, weight = chosen.of(start, batch.num_rows)
                rows = batch.filter(pa.array(kept))
                if weight is not None:
                    rows = pa.RecordBatch.from_arrays([*rows.columns, pa.array(weight)], schema=schema)
                write(rows)
                start += batch.num_rows
                yield rows.num_rows

    def write_columns(self, target: Path, blocks: Iterable[Mapping[str, Any]]) -> Iterator[int]:
        """Write a table."""
        pa = need_pyarrow(self._path)
        blocks = iter(blocks)
        first = next(blocks, None)
        batches = (
            pa.RecordBatch.from_pydict(dict(block)) for one in ([first] if first else [], blocks) for block in one
        )
        batch = next(batches, None)
        schema = pa.schema([]) if batch is None else batch.schema
        options = write_options(self._path, self._kind)
        with (
            compressing(target, compression_of(self._path)) as file,
            column_writer(file, self._kind, schema, **options) as write,
        ):
            while batch is not None:
                write(batch)
                yield batch.num_rows
                batch = next(batches, None)
