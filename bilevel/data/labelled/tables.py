"""Labelled rows in tables: CSV and Parquet files with a named column of labels; the other columns are features."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.opening import Place, name_of, open_bytes
from bilevel.types import UserError

SUFFIXES = (".csv", ".csv.gz", ".parquet")


def table_arrays(path: Place, label: str | None, known: tuple[str, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The features and the labels of a CSV file (its first line names the columns) or a Parquet file.

    Args:
        path: a path or URL that ends with one of `SUFFIXES`.
        label: name of the column of labels; None takes the first of `known` that there is.
        known: names that it may have.

    Returns:
        Features float64 `[N, d]`, NaN where a value is missing, and labels `[N]` of the column's type, text as `str`.

    Raises:
        UserError: the file cannot be read, there is no such column, a label is missing, or a feature is not a number.
    """
    table = _read(path)
    names: list[str] = list(table.column_names)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has several columns called {repeated[0]!r}; rename them, in the first line.")
    target = label if label is not None else next((name for name in known if name in names), None)
    if target not in names:
        wanted = f"no column {label!r}" if label is not None else f"no column {', '.join(known[:-1])} or {known[-1]}"
        raise UserError(
            f"{path} has {wanted}, but {_some(names)}; name the column of the labels (the first line of a CSV file names "
            "the columns)."
        )
    columns = [_numbers(table.column(name), name, path) for name in names if name != target]
    if not columns:
        raise UserError(f"{path} has no column beside that of the labels, {target!r}; add features.")
    return np.stack(columns, axis=1), _labels(table.column(target), str(target), path)


def _read(path: Place) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs pyarrow, which cannot be imported ({error}); "
            "install it with: pip install 'bilevel[experiments]'"
        ) from error
    read: Any = pyarrow.parquet.read_table if name_of(path).endswith(".parquet") else pyarrow.csv.read_csv
    try:
        if isinstance(path, Path):
            return read(str(path))
        with open_bytes(path) as file:
            return read(file)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        found = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table ({found}); correct it, or write it again.") from error


def _numbers(column: Any, name: str, path: Place) -> NDArray[np.float64]:
    """A column of features."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        if pa.types.is_null(kind):
            raise UserError(f"{path}: the column {name!r} is empty; leave it out.")
        example = next((value for value in column.to_pylist() if value is not None), None)
        raise UserError(
            f"{path}: the column {name!r} holds {kind}, such as {str(example)[:40]!r}, not numbers; write numbers in its place, "
            "or leave it out."
        )
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _labels(column: Any, name: str, path: Place) -> NDArray[Any]:
    import pyarrow as pa

    if column.null_count:
        row = next(i for i, value in enumerate(column.to_pylist()) if value is None)
        raise UserError(f"{path}: row {row} has no label in the column {name!r}; leave such rows out.")
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False)
    return np.asarray(column.cast(pa.string()).to_pylist(), dtype=np.str_)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
