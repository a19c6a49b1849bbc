"""Rows of other data sets among those of a first: in fixed parts of a batch, or drawn alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset, NumpyBatch
from bilevel.data.loading.joined import JoinedData
from bilevel.data.loading.loader import Loader
from bilevel.data.loading.views import RowView
from bilevel.types import UserError


class MixedLoader:
    """Joins the batches of two loaders: those of `first`, then those of `second`.

    `batch(step)` is a function of the step, as for `Loader`. Both data sets have the same arrays. Where there is an array `id`,
    the rows of `second` have -1 there, as they are no rows of `first`. The batches of all processes, one after the other, are
    that of one process.

    Args:
        first: gives the first rows of a batch.
        second: gives the others.

    Raises:
        UserError: the arrays of their data differ, or their processes.
    """

    def __init__(self, first: Loader, second: Loader):
        here, there = ((x.process_index, x.process_count) for x in (first, second))
        if here != there:
            raise UserError(
                f"One loader of a mixed batch is for process {here[0]} of {here[1]}, the other for {there[0]} of {there[1]}: "
                "give both the same."
            )
        self.first, self.second = first, second
        self.batch_size = first.batch_size + second.batch_size
        self.dataset: Dataset = MixedData(first.dataset, second.dataset)
        """The rows of `first`, then those of `second`."""
        share = self.batch_size // first.process_count
        self._own = slice(first.process_index * share, (first.process_index + 1) * share)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0) in `dataset`.

        int64 `[batch_size]`; those of `first` come first.
        """
        return np.concatenate([self.first.indices(step), self.second.indices(step) + len(self.first.dataset)])

    def batch(self, step: int) -> NumpyBatch:
        """Load this process's slice of the batch `step` (from 0)."""
        return self.dataset.rows(self.indices(step)[self._own])


class MixedData(JoinedData):
    """Several data sets as one; only the rows of the first have an `id`, the one that they have there, and others -1.

    What is known of rows by their `id` is then counted for the rows of the first alone.

    Args:
        first: whose rows keep their `id`.
        others: whose rows follow, in this order.

    Raises:
        UserError: the arrays of their rows differ.
    """

    def __init__(self, first: Dataset, *others: Dataset):
        mixed = {f"{other.name} (mixed in, {i} of {len(others)})": other for i, other in enumerate(others, 1)}
        super().__init__({first.name: first, **mixed})
        self._own = len(first)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`."""
        batch = self.gathered(indices)
        if "id" in batch:
            batch["id"][np.asarray(indices) >= self._own] = -1
        return batch


def each_part(dataset: Dataset, change: Callable[[Any], Dataset]) -> Dataset:
    """Change the data sets that a view, or joined data, are made of.

    Args:
        dataset: a data set, a `RowView` of one, or several that are joined or mixed.
        change: a data set -> the same rows, of fewer arrays for example.

    Returns:
        The same rows in the same order.
    """
    if isinstance(dataset, RowView):
        return RowView(each_part(dataset.dataset, change), dataset.positions)
    if not isinstance(dataset, JoinedData):
        return change(dataset)
    parts = {name: each_part(part, change) for name, part in dataset.parts.items()}
    return MixedData(*parts.values()) if isinstance(dataset, MixedData) else JoinedData(parts)
