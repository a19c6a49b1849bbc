"""Batches in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset, NumpyBatch
from bilevel.data.loading.permutation import permute
from bilevel.types import UserError

_AT_ONCE = 4096  # rows drawn at once, as each draw has a fixed cost


class Loader:
    """Draws whole batches.

    `batch(step)` depends on the constructor's arguments and `step` only.

    Every epoch is a new permutation of all rows. Batches run over the ends of epochs, so no row is dropped:
    rows `step * batch_size` to `(step + 1) * batch_size - 1` of the endless sequence of epochs make up batch
    `step`.

    Args:
        dataset: where the rows come from.
        batch_size: rows of the global batch, over all processes.
        seed: not negative; selects the order.
        process_index: which contiguous slice of each global batch this process reads.
        process_count: the number of slices. The global order does not depend on it.

    Raises:
        UserError: the batch is larger than the data set, or is not divided by the number of processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        check_batch_size(batch_size)
        if batch_size > len(dataset):
            raise UserError(
                f"A batch of {batch_size} rows cannot be drawn from {dataset.name}, which has {len(dataset)} "
                f"rows; use a batch size (--batch-size) of at most {len(dataset)}, or give more data."
            )
        if process_count < 1 or batch_size % process_count:
            raise UserError(
                f"A batch of {batch_size} rows of {dataset.name} cannot be divided among {process_count} "
                "processes; use a batch size (--batch-size, --big-batch-size) that is a multiple of the number of processes."
            )
        if not 0 <= process_index < process_count:
            raise UserError(f"The process index is {process_index}; it must be 0 to {process_count - 1}.")
        if seed < 0:
            raise UserError(f"The seed is {seed}; it must not be negative.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.process_index, self.process_count = process_index, process_count
        self._share = batch_size // process_count
        self._skip = process_index * self._share
        self._steps_at_once = max(1, _AT_ONCE // batch_size)
        self._drawn: tuple[int, NDArray[np.int64]] | None = None  # the last group of steps, and its rows

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0), int64 `[batch_size]`."""
        return self._rows_of(_checked(step))

    def batch(self, step: int) -> NumpyBatch:
        """Load this process's slice of the batch `step` (from 0).

        `batch_size / process_count` rows.
        """
        if self._share == self.batch_size:
            return self.dataset.rows(self._rows_of(_checked(step)))
        return self.dataset.rows(self._rows_at(_checked(step) * self.batch_size + self._skip, self._share))

    def _rows_of(self, step: int) -> NDArray[np.int64]:
        """The rows of a whole batch. Small ones are drawn for several steps at once, which costs little more than one."""
        group, place = divmod(step, self._steps_at_once)
        size = self._steps_at_once * self.batch_size
        drawn = self._drawn
        if drawn is None or drawn[0] != group:
            drawn = self._drawn = group, self._rows_at(group * size, size)
        return drawn[1][place * self.batch_size : (place + 1) * self.batch_size].copy()

    def _rows_at(self, first: int, count: int) -> NDArray[np.int64]:
        """The rows `first` to `first + count - 1` of the endless sequence of epochs."""
        size = len(self.dataset)
        epochs, positions = np.divmod(np.arange(first, first + count), size)
        bounds = [*np.flatnonzero(np.diff(epochs, prepend=-1)), count]
        return np.concatenate(
            [permute(positions[start:stop], size, self.seed, int(epochs[start])) for start, stop in pairwise(bounds)]
        )


def _checked(step: int) -> int:
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    return step


def check_batch_size(batch_size: int) -> None:
    """Raise a UserError unless `batch_size` is positive."""
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}; it must be at least 1.")


def evaluation_batches(dataset: Dataset, batch_size: int, limit: int | None = None) -> Iterator[NumpyBatch]:
    """Yield all rows once, in stored order, in batches of one constant shape.

    Args:
        dataset: where the rows come from; it may have fewer rows than a batch.
        batch_size: rows of every batch.
        limit: the largest number of rows to use; they are taken at even distances from the whole data set.

    Returns:
        Batches with a further array `mask`, float32 `[batch_size]`: 1 for a row, 0 for padding at the end of
        the last batch (a repeated row).

    Raises:
        UserError: `batch_size` or `limit` is not positive, or the data set has an array `mask` of its own.
    """
    check_batch_size(batch_size)
    size = len(dataset)
    if limit is not None and limit < 1:
        raise UserError(f"The limit of rows to evaluate on {dataset.name} is {limit}; it must be at least 1.")
    if "mask" in dataset.rows(np.zeros(1, np.int64)):
        raise UserError(f"{dataset.name}: the name 'mask' is taken by the padding mask; rename this array.")
    count = size if limit is None else min(limit, size)

    def batches() -> Iterator[NumpyBatch]:
        for start in range(0, count, batch_size):
            places = np.arange(start, start + batch_size)
            rows = np.minimum(places, count - 1) * size // count
            yield {**dataset.rows(rows), "mask": (places < count).astype(np.float32)}

    return batches()
