"""Rows with one array more, looked up by their number."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.loading.arrays import Dataset, NumpyBatch
from bilevel.types import UserError


class WithColumn:
    """The rows of a data set with an array more.

    Args:
        dataset: the rows; views keep the `id` of the whole.
        name: of the new array in a batch.
        values: `[N, …]`, by `id`; a memory-mapped array stays on disk.
        fingerprint: identifies the values.

    Raises:
        UserError: the rows have such an array.
    """

    def __init__(self, dataset: Dataset, name: str, values: NDArray[Any], fingerprint: str):
        if name in dataset.rows(np.zeros(1, np.int64)):
            raise UserError(f"{dataset.name} has an array {name!r} already: give the new one another name.")
        self._dataset, self._column, self._values, self._fingerprint = dataset, name, values, fingerprint

    @property
    def name(self) -> str:
        """Name of the data set, for messages."""
        return self._dataset.name

    @property
    def content_hash(self) -> str:
        """A digest of the rows and the new values."""
        return digest(["with", self._column, self._dataset.content_hash, self._fingerprint])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`, each with its value."""
        batch = self._dataset.rows(indices)
        return {**batch, self._column: np.asarray(self._values[batch["id"]])}
