"""Records of tables, one after another: rows of Parquet files, records of TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bilevel.data.opening import PACKED_SUFFIXES, Place, name_of, open_bytes, read_errors
from bilevel.types import UserError

_CHUNK = 1024  # records read at once


def parquet_records(
    path: Place, columns: Callable[[Any], list[str]], *, at_once: int = _CHUNK
) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Parquet file, which may be compressed once more.

    Args:
        path: the file.
        columns: Arrow schema -> the names of the columns to read.
        at_once: rows held in memory.

    Raises:
        UserError: the file is damaged, or pyarrow is missing.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: run `pip install 'bilevel[experiments]'`.") from error
    packed = name_of(path).lower().endswith(PACKED_SUFFIXES)
    try:
        with open_bytes(path, decompress=packed) as file, read_errors(path):
            table = pyarrow.parquet.ParquetFile(pa.BufferReader(file.read()) if packed else file)
            for batch in table.iter_batches(at_once, columns=columns(table.schema_arrow)):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        found = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a Parquet file ({found}); write it again.") from error


def all_records(records: Any, *, at_once: int = _CHUNK) -> Iterator[Any]:
    """Stream what `bilevel.data.tfds.open_records` opened, some records at once, which is faster than one by one."""
    for start in range(0, len(records), at_once):
        yield from records.__getitems__(range(start, min(start + at_once, len(records))))
