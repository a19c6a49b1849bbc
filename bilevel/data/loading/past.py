"""Batches that bring along arrays of the rows before them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset, NumpyBatch
from bilevel.types import Batch, Shared, UserError


class Numbered(Protocol):
    """Gives batches, and their rows by number: `Loader`, `MixedLoader`, `TaskLoader`."""

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        ...

    def indices(self, step: int, /) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0), int64 `[batch_size]`."""
        ...

    def batch(self, step: int, /) -> NumpyBatch:
        """Load this process's slice of the batch `step` (from 0)."""
        ...


class PastLoader:
    """Adds to each batch some arrays of the rows that were loaded before it, `Shared` by its rows.

    The past of a batch is a function of (seed, step), as the batch is: it holds the last `count` rows in the order of the loader,
    the newest last, whatever was trained on. The batch has it as `batch[name].arrays`: the arrays of `rows`, each `[count, …]`,
    and `real`, bool `[count]`, which is False for places without a row, when training begins. All processes load the whole past.

    Args:
        loader: gives the batches.
        rows: the rows of `loader.dataset`, of the arrays that the past is of alone (`CaptionRows.captions`).
        count: number of rows in the past.
        name: of the past in a batch.

    Raises:
        UserError: there is no past to keep, `rows` are others, or a name is taken.
    """

    def __init__(self, loader: Numbered, rows: Dataset, count: int, *, name: str = "past"):
        if count < 1:
            raise UserError(f"A past of {count} rows holds nothing; keep at least 1.")
        if len(rows) != len(loader.dataset):
            raise UserError(
                f"The past of {loader.dataset.name}, which has {len(loader.dataset)} rows, cannot be of the {len(rows)} rows of "
                f"{rows.name}: give the same rows, of fewer arrays."
            )
        one, whole = (found.rows(np.zeros(1, np.int64)) for found in (rows, loader.dataset))
        self.columns = tuple(column for column in one if column != "id")
        """Names of the arrays that the past is of."""
        if missing := [column for column in self.columns if column not in whole]:
            raise UserError(
                f"{loader.dataset.name} has no array {missing[0]!r} that {rows.name} has: give the same rows."
            )
        if name in whole or "real" in self.columns:
            taken = name if name in whole else "real"
            raise UserError(
                f"The name {taken!r} of the past is taken by an array of {loader.dataset.name}: give another."
            )
        self.loader, self.rows, self.count, self.name = loader, rows, count, name

    @property
    def dataset(self) -> Dataset:
        """Where the rows of the batches come from."""
        return self.loader.dataset

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0)."""
        return self.loader.indices(step)

    def past(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of the past of batch `step` (from 0), int64 `[count]`; −1 where there is no row."""
        found: list[NDArray[np.int64]] = []
        missing = self.count
        while missing > 0 and step > 0:
            step -= 1
            found.insert(0, self.loader.indices(step)[-missing:])
            missing -= len(found[0])
        return np.concatenate([np.full(missing, -1, np.int64), *found])

    def shared(self, step: int) -> dict[str, Shared]:
        """Load what batch `step` (from 0) has besides its rows."""
        numbers = self.past(step)
        rows = self.rows.rows(np.maximum(numbers, 0))
        arrays: dict[str, NDArray[Any]] = {column: rows[column] for column in self.columns}
        return {self.name: Shared({**arrays, "real": numbers >= 0})}

    def batch(self, step: int) -> Batch:
        """Load this process's slice of the batch `step` (from 0), and its whole past."""
        return {**self.loader.batch(step), **self.shared(step)}
