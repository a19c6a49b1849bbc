"""Batches of whole groups of rows, such as all translations of some sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.loading.arrays import Dataset, NumpyBatch, check_rows
from bilevel.data.loading.loader import Loader
from bilevel.types import UserError

GROUP = "group"
"""Array of a batch: the number of each row's group, int32 `[b]`; −1 for a row that stands for an empty cell."""


class GroupedData:
    """Rows with the number of their group, and one more row that stands for what a group lacks: its `id` and `group` are −1.

    Args:
        dataset: N rows with an `id`.
        table: int32 `[T, n]`, row numbers of T groups; −1 in an empty cell. No row stands there twice.

    Raises:
        UserError: the rows have an array `group` already.
    """

    def __init__(self, dataset: Dataset, table: NDArray[np.int32]):
        self._dataset, self.table = dataset, table
        check_rows(len(dataset) + 1, dataset.name)
        if GROUP in dataset.rows(np.zeros(1, np.int64)):
            raise UserError(
                f"{dataset.name}: the name {GROUP!r} is taken by the number of a row's group; rename this array."
            )
        lines, columns = np.nonzero(table >= 0)
        self._group = np.full(len(dataset) + 1, -1, np.int32)
        self._group[table[lines, columns]] = lines

    @property
    def name(self) -> str:
        """Name of the rows, for messages."""
        return self._dataset.name

    @property
    def content_hash(self) -> str:
        """A digest of the rows and of the table."""
        return digest(["grouped", self._dataset.content_hash, self.table.tobytes()])

    def __len__(self) -> int:
        """Return N + 1."""
        return len(self._dataset) + 1

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`; number N, or −1, is the one for empty cells, with the arrays of row 0."""
        numbers = np.asarray(indices)
        absent = (numbers < 0) | (numbers == len(self._dataset))
        batch = self._dataset.rows(np.where(absent, 0, numbers))
        return {
            **batch,
            "id": np.where(absent, np.int32(-1), batch["id"]),
            GROUP: np.where(absent, -1, self._group[numbers]),
        }

    def mean_rows(self, cells: int) -> float:
        """Return how many rows the groups in a batch of so many cells have on average."""
        lines, columns = self.table.shape
        return cells // columns * len(self._dataset) / lines


class GroupLoader:
    """Draws batches of whole groups, in an order that is a function of (seed, step), as for `Loader`.

    Args:
        dataset: the rows and their groups.
        groups: G, in a global batch, over all processes; a batch has G·n rows, those of a group together.
        seed: as for `Loader`, like `process_index` and `process_count`.
        process_index: see there.
        process_count: see there.

    Raises:
        UserError: as `Loader`.
    """

    def __init__(self, dataset: GroupedData, groups: int, *, seed: int, process_index: int = 0, process_count: int = 1):
        self.dataset, self.batch_size = dataset, groups * dataset.table.shape[1]
        self.process_index, self.process_count = process_index, process_count
        self._groups = Loader(
            _Numbers(dataset), groups, seed=seed, process_index=process_index, process_count=process_count
        )

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0), int64 `[G·n]`; N where a group has no row."""
        return self._of(self._groups.indices(step))

    def batch(self, step: int) -> NumpyBatch:
        """Load this process's slice of the batch `step` (from 0)."""
        return self.dataset.rows(self._of(self._groups.batch(step)[GROUP]))

    def _of(self, groups: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        found = self.dataset.table[groups].reshape(-1).astype(np.int64)
        return np.where(found < 0, len(self.dataset) - 1, found)


class _Numbers:
    """The numbers of the groups as a data set."""

    def __init__(self, dataset: GroupedData):
        self.name, self.content_hash, self._size = dataset.name, dataset.content_hash, len(dataset.table)

    def __len__(self) -> int:
        return self._size

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        return {GROUP: np.asarray(indices)}
