"""Parquet and Arrow files, read and written some rows at a time, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from bilevel.data.notes import note
from bilevel.data.opening import Place, compression_of, open_bytes, read_errors
from bilevel.types import UserError

ColumnKind = Literal["parquet", "arrow", "arrow_stream"]
"""Parquet; Arrow IPC with a footer (also called Feather); Arrow IPC as a stream."""
NAMES: dict[str, str] = {"parquet": "Parquet", "arrow": "Arrow", "arrow_stream": "Arrow"}
_BATCH_BYTES = 1 << 22
_MOST_ROWS = 8192
_GROUP_BYTES = 1 << 25
_BUFFER = 1 << 20
_END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
Choose = Callable[[Any], list[str]]
"""Arrow schema -> the names of the columns to read; "a.b" is the field b of the column a."""


def need_pyarrow(place: Place) -> Any:
    """Import pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {place} needs pyarrow: run `pip install 'bilevel[experiments]'`.") from error
    return pa


def schema_of(path: Place, kind: ColumnKind) -> Any:
    """Return the Arrow schema of a file; errors as `column_batches`."""
    with _opened(path, kind) as (_, file):
        return file.schema_arrow if kind == "parquet" else file.schema


def column_batches(
    path: Place, kind: ColumnKind, choose: Choose | None = None, *, at_once: int | None = None
) -> Generator[Any]:
    """Stream the rows of a file, which may be compressed once more, as Arrow record batches.

    Args:
        path: the file.
        kind: what it is.
        choose: which columns to read; None: all.
        at_once: most rows of a batch; by default as many as make about 4 MiB.

    Raises:
        UserError: the file is damaged, or pyarrow is missing; or as `choose`.
    """
    if kind == "parquet":
        yield from _parquet_batches(path, choose, at_once)
        return
    included = None
    if choose is not None:  # columns of an Arrow file are chosen by their numbers, before it is opened
        schema = schema_of(path, kind)
        outer = {name if name in schema.names else name.partition(".")[0] for name in choose(schema)}
        included = [number for number, name in enumerate(schema.names) if name in outer]
    with _opened(path, kind, included) as (source, file):
        if kind == "arrow":
            found: Iterator[Any] = map(file.get_batch, range(file.num_record_batches))
        else:
            found = iter(file)
        for batch in found:
            rows = at_once or _rows_at_once(batch.num_rows, batch.nbytes)
            yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))
        if kind == "arrow_stream":
            _note_missing_end(path, source)


def row_counts(path: Place, kind: ColumnKind) -> Iterator[int]:
    """Stream the numbers of rows of some batches, which are read as little as the format permits."""
    if kind != "parquet":
        yield from (batch.num_rows for batch in column_batches(path, kind, lambda schema: schema.names[:1]))
        return
    with _opened(path, kind) as (_, file):
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            yield from (min(_MOST_ROWS, rows - start) for start in range(0, rows, _MOST_ROWS))


def _parquet_batches(path: Place, choose: Choose | None, at_once: int | None) -> Iterator[Any]:
    with _opened(path, "parquet") as (_, file):
        names = None if choose is None else choose(file.schema_arrow)
        for number in range(file.num_row_groups):
            rows = at_once or _rows_of_group(file.metadata.row_group(number), names)
            yield from file.iter_batches(rows, row_groups=[number], columns=names)


def _rows_of_group(group: Any, names: list[str] | None) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    if names is not None:
        begins = tuple(f"{name}." for name in names)
        columns = [column for column in columns if f"{column.path_in_schema}.".startswith(begins)]
    return _rows_at_once(group.num_rows, sum(column.total_uncompressed_size for column in columns))


def _rows_at_once(rows: int, size: int) -> int:
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * rows // max(1, size)))


@contextlib.contextmanager
def _opened(path: Place, kind: ColumnKind, included: list[int] | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a file: what it is read from, and pyarrow's reader."""
    pa = need_pyarrow(path)
    with read_errors(path), open_bytes(path) as stream, _damage(path, kind):
        whole = kind != "arrow_stream" and compression_of(path) is not None  # the end is read first
        source: Any = io.BytesIO(stream.read()) if whole else stream
        if kind == "parquet":
            yield source, pa.parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)
        else:
            options = pa.ipc.IpcReadOptions(included_fields=included)
            open_file = pa.ipc.open_file if kind == "arrow" else pa.ipc.open_stream
            yield source, open_file(source, options=options)


@contextlib.contextmanager
def _damage(path: Place, kind: ColumnKind) -> Iterator[None]:
    pa = need_pyarrow(path)
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as a {NAMES[kind]} file ({found}); it is damaged or cut off: copy or write it again."
        ) from error


def _note_missing_end(path: Place, source: Any) -> None:
    """Say that a stream has no end mark: it may have been cut off between two batches."""
    if isinstance(path, Path) and compression_of(path) is None:
        source.seek(-len(_END_MARK), os.SEEK_END)
        if not source.read().endswith(_END_MARK[-4:]):
            note(f"the Arrow stream {path} has no end mark: it may be cut off.")


@contextlib.contextmanager
def column_writer(file: BinaryIO, kind: ColumnKind, schema: Any, **options: Any) -> Iterator[Callable[[Any], None]]:
    """Yield what writes record batches; small ones are joined to groups of about 32 MiB (Arrow: 4 MiB).

    Args:
        file: where to.
        kind: what is written.
        schema: of the batches.
        **options: of `ParquetWriter`, or of `IpcWriteOptions`.
    """
    pa = need_pyarrow("the result")
    if kind == "parquet":
        made: Any = pa.parquet.ParquetWriter(file, schema, **options)
    else:
        new: Any = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        made = new(file, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=kind == "arrow", **options))
    held: list[Any] = []
    enough = _GROUP_BYTES if kind == "parquet" else _BATCH_BYTES

    def flush() -> None:
        if held:
            table = pa.Table.from_batches(held, schema).combine_chunks()
            held.clear()
            made.write_table(table)

    def write(batch: Any) -> None:
        if batch.num_rows:
            held.append(batch)
        if sum(one.nbytes for one in held) >= enough:
            flush()

    with made:
        yield write
        flush()


def write_options(path: Place, kind: ColumnKind) -> dict[str, Any]:
    """Return the options with which `column_writer` compresses as a file is compressed; Arrow files are not, Feather by lz4."""
    if kind == "parquet":
        with _opened(path, kind) as (_, file):
            group = file.metadata.row_group(0) if file.num_row_groups and file.metadata.num_columns else None
            found = "SNAPPY" if group is None else group.column(0).compression
            return {"compression": {"UNCOMPRESSED": "none"}.get(found, found.lower())}
    return {"compression": "lz4" if str(path).lower().endswith(".feather") else None}


def place_in(schema: Any, name: str, path: Place, flag: str) -> tuple[str, ...]:
    """Return where a column is: its name, or those of a column and of fields inside, for "a.b".

    Raises:
        UserError: there is no such column, or there are several; the message names `flag`.
    """
    pa = need_pyarrow(path)
    place: tuple[str, ...] = ()
    fields, rest = list(schema), name
    while True:
        names = [field.name for field in fields]
        if names.count(rest) > 1:
            raise UserError(f"{path} has several columns called {name!r}; rename them.")
        if rest in names:
            return (*place, rest)
        outer, dot, rest = rest.partition(".")
        inner = next((field.type for field in fields if field.name == outer), None)
        if not dot or inner is None or not pa.types.is_struct(inner):
            found = ", ".join(repr(name) for name in schema.names[:20]) or "none"
            raise UserError(
                f"{path} has no column {name!r}; the columns found are: {found}; name another one ({flag})."
            )
        place, fields = (*place, outer), list(inner)


def values_at(batch: Any, place: tuple[str, ...]) -> Any:
    """Return the values of a column, or of a field inside one, null where what holds it is null."""
    pa = need_pyarrow("a table")
    values = batch.column(place[0])
    for name in place[1:]:
        values = pa.compute.struct_field(values, name)
    return values
