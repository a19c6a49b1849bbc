"""Batches of which a fixed part comes from a second data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.arrays import Dataset, NumpyBatch
from bilevel.data.joined import JoinedData
from bilevel.data.loader import Loader


class MixedLoader:
    """Joins the batches of two loaders: those of `first`, then those of `second`.

    `batch(step)` is a function of the step, as for `Loader`. Both data sets have the same arrays. Where there is an array `id`,
    the rows of `second` have -1 there, as they are no rows of `first`.
    """

    def __init__(self, first: Loader, second: Loader):
        self.first, self.second = first, second
        self.batch_size = first.batch_size + second.batch_size

    @property
    def dataset(self) -> Dataset:
        """The rows of `first`, then those of `second`.

        Raises:
            UserError: their arrays differ.
        """
        return _Mixed(self.first.dataset, self.second.dataset)

    def indices(self, step: int) -> NDArray[np.int64]:
        """The row numbers in `dataset` of the global batch `step` (from 0), int64 `[batch_size]`: those of `first` come first."""
        return np.concatenate([self.first.indices(step), self.second.indices(step) + len(self.first.dataset)])

    def batch(self, step: int) -> NumpyBatch:
        """This process's slice of the batch `step` (from 0)."""
        first, second = self.first.batch(step), self.second.batch(step)
        if "id" in second:
            second = {**second, "id": np.full_like(second["id"], -1)}
        return {name: np.concatenate([first[name], second[name]]) for name in first}


class _Mixed(JoinedData):
    """Two data sets as one; only the rows of the first have an `id`, the one that they have there."""

    def __init__(self, first: Dataset, second: Dataset):
        super().__init__({first.name: first, f"{second.name} (mixed in)": second})

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        batch = self.gathered(indices)
        if "id" in batch:
            batch["id"][np.asarray(indices) >= self.starts[1]] = -1
        return batch
