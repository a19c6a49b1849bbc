"""Labelled rows in tables: CSV and Parquet files with a named column of labels; the other columns are features."""

from __future__ import annotations

import lzma
import re
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.notes import note, some
from bilevel.data.opening import Place, name_of, open_bytes
from bilevel.types import UserError

SUFFIXES = (".csv", ".csv.gz", ".parquet")


_UNNAMED = re.compile(r"\s*|Unnamed: ?\d+|__index_level_\d+__", re.IGNORECASE)
_NUMBER = re.compile(
    r"(.*[\W_])?(id|index|idx|no\.?|nr\.?|number|num|#)|.*[a-z]I[dD]|(row|obs|observation|sample|example|record|line|item)s?"
    r"([\W_]?(names?|nums?))?|n|i",
    re.IGNORECASE,
)
"""What columns that count are called, where they count the rows."""
_ENOUGH = 20
"""Rows that are numbered by a column of any name; with fewer it may be chance."""


class Columns(NamedTuple):
    """The columns of a table, by their names."""

    features: tuple[str, ...]
    label: str
    left_out: tuple[str, ...]
    """They number the rows."""


class Table(NamedTuple):
    """What is read of a table."""

    features: NDArray[Any]
    labels: NDArray[Any]
    columns: Columns


def table_arrays(path: Place, label: str | None, known: tuple[str, ...], train: Columns | None = None) -> Table:
    """The features and the labels of a CSV file (its first line names the columns) or a Parquet file.

    A column that numbers the rows is no feature: one without a name (as pandas writes its index), or one that counts and is
    called id, index and the like. It is left out, and named on stderr. A first column that counts and has another name is kept,
    and named too.

    Args:
        path: a path or URL that ends with one of `SUFFIXES`.
        label: name of the column of labels; None takes the one of `known` that there is.
        known: names that it may have.
        train: the columns of the training part, which this part must have too, in any order.

    Returns:
        Features float64 `[N, d]`, NaN where a value is missing, and labels `[N]` of the column's type, text as `str`.

    Raises:
        UserError: the file cannot be read, there is no such column, a label is missing, or a feature is not a number.
    """
    table = _read(path)
    names: list[str] = list(table.column_names)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has several columns called {repeated[0]!r}; rename them, in the first line.")
    columns = _columns(table, names, _target(path, names, label or (train and train.label), known), path, train)
    features = [_numbers(table.column(name), name, path) for name in columns.features]
    if not features:
        raise UserError(f"{path} has no column beside that of the labels, {columns.label!r}; add features.")
    return Table(np.stack(features, axis=1), _labels(table.column(columns.label), columns.label, path), columns)


def _target(path: Place, names: list[str], label: str | None, known: tuple[str, ...]) -> str:
    """The name of the column of labels."""
    found = [name for name in ((label,) if label is not None else known) if name in names]
    if len(found) > 1:
        raise UserError(
            f"{path} has the columns {found[0]} and {found[1]}: name that of the labels with --data.label; the other one is a "
            "feature then, so remove it if it tells the labels too."
        )
    if not found:
        wanted = f"no column {label!r}" if label is not None else f"no column {', '.join(known[:-1])} or {known[-1]}"
        raise UserError(
            f"{path} has {wanted}, but {some(names)}; name the column of the labels with --data.label (the first line of a "
            "CSV file names the columns)."
        )
    return found[0]


def _columns(table: Any, names: list[str], target: str, path: Place, train: Columns | None) -> Columns:
    features = [name for name in names if name != target]
    if train is not None:
        if missing := [name for name in train.features if name not in features]:
            raise UserError(f"{path} has no column {missing[0]!r}, which the training part has; add it.")
        if more := [name for name in features if name not in train.features + train.left_out and name.strip()]:
            raise UserError(f"{path} has a column {more[0]!r}, which the training part has not; remove it.")
        return train
    numbering = {name: why for name in features if (why := _numbering(table, name))}
    if len(numbering) == len(features):  # nothing else to learn from
        numbering = {name: why for name, why in numbering.items() if _UNNAMED.fullmatch(name)}
    for name, why in numbering.items():
        note(f"the column {name!r} of {path} is left out: {why}.")
    if names[0] in features and names[0] not in numbering and len(table) >= _ENOUGH and _counts(table.column(names[0])):
        note(
            f"the column {names[0]!r} of {path} counts the rows, and is a feature; remove it if it is a number of the row."
        )
    return Columns(tuple(name for name in features if name not in numbering), target, tuple(numbering))


def _numbering(table: Any, name: str) -> str | None:
    """Why a column is one that numbers the rows; None if it is not."""
    stored = (table.schema.pandas_metadata or {}).get("index_columns", [])
    if name in stored:
        return "it is the index of a pandas table"
    if _UNNAMED.fullmatch(name):
        return "it has no name, as the row numbers that pandas and R write"
    if _NUMBER.fullmatch(name.strip()) and _counts(table.column(name)):
        return "it numbers the rows; rename it if it is a feature"
    return None


def _counts(column: Any) -> bool:
    """Whether a column holds consecutive whole numbers."""
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count or len(column) < 2:
        return False
    values = column.to_numpy(zero_copy_only=False)
    return np.array_equal(values, np.arange(len(values)) + values[0])


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
    parquet = name_of(path).lower().endswith(".parquet")
    read: Any = pyarrow.parquet.read_table if parquet else pyarrow.csv.read_csv
    try:
        with open_bytes(path, decompress=not parquet) as file:
            return read(file)
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
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
