"""Records of tables, one after another: rows of Parquet files, records of TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bilevel.data.columnar import Choose, column_batches
from bilevel.data.opening import Place

_CHUNK = 1024  # records read at once


def parquet_records(path: Place, choose: Choose, *, at_once: int = _CHUNK) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Parquet file; see `column_batches`."""
    for batch in column_batches(path, "parquet", choose, at_once=at_once):
        yield from batch.to_pylist()


def all_records(records: Any, *, at_once: int = _CHUNK) -> Iterator[Any]:
    """Stream what `bilevel.data.tfds.open_records` opened, some records at once, which is faster than one by one."""
    for start in range(0, len(records), at_once):
        yield from records.__getitems__(range(start, min(start + at_once, len(records))))


def cell(record: Mapping[str, Any], name: str, missing: Any = None) -> Any:
    """Return a value; in "captions.text" the name behind the dot is that of a field inside, or of the items of a list."""
    if name in record or "." not in name:
        return record.get(name, missing)
    outer, _, inner = name.partition(".")
    value = record.get(outer)
    if isinstance(value, Mapping):
        return cell(value, inner, missing)
    return [cell(part, inner) for part in value] if isinstance(value, list | tuple | np.ndarray) else missing
