"""Parts of a data set, without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.loading.arrays import Dataset, NumpyBatch
from bilevel.data.loading.joined import JoinedData
from bilevel.types import UserError


class RowView:
    """Some rows of a data set, as a data set.

    Its batches keep the `id` that the rows have in the whole.

    Args:
        dataset: the whole.
        positions: integers `[n]`: the rows of the whole that row 0, 1, … of the view stand for.

    Raises:
        UserError: the positions are no row numbers of the whole.
    """

    def __init__(self, dataset: Dataset, positions: NDArray[np.integer[Any]]):
        positions = np.asarray(positions)
        if positions.ndim != 1 or (len(positions) and not np.issubdtype(positions.dtype, np.integer)):
            advice = "give np.flatnonzero(mask)" if positions.dtype == bool else "give row numbers"
            raise UserError(
                f"The positions of a view of {dataset.name} are {positions.dtype} {list(positions.shape)}, not integers [n]: "
                f"{advice}."
            )
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(dataset):
            raise UserError(
                f"The positions of a view of {dataset.name} lie between {positions.min()} and {positions.max()}: give numbers "
                f"from 0 to {len(dataset) - 1}."
            )
        self.dataset = dataset
        self.positions = np.asarray(positions, np.int32)  # row numbers fit (check_rows), in half the memory

    @property
    def name(self) -> str:
        """Name of the whole, for messages."""
        return self.dataset.name

    @property
    def content_hash(self) -> str:
        """Hash of the whole.

        What is kept by `id` holds for all its views; see `rows_hash`.
        """
        return self.dataset.content_hash

    def __len__(self) -> int:
        """Return the number of rows of the view."""
        return len(self.positions)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows of the view."""
        return self.dataset.rows(self.positions[indices])


def rows_hash(dataset: Dataset) -> str:
    """Digest the rows of a data set, or of a view, in their order.

    Hexadecimal; for what is kept by their positions.

    It is the `content_hash`, but for views and what is joined of them.
    """
    if isinstance(dataset, JoinedData):
        return digest(["joined", *map(rows_hash, dataset.parts.values())])
    if not isinstance(dataset, RowView):
        return dataset.content_hash
    return digest(["view", rows_hash(dataset.dataset), dataset.positions.tobytes()])
