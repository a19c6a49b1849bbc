"""Parts of a data set, without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.arrays import Dataset, NumpyBatch


class RowView:
    """Some rows of a data set, as a data set. Its batches keep the `id` that the rows have in the whole.

    Args:
        dataset: the whole.
        positions: integers `[n]`: the rows of the whole that row 0, 1, … of the view stand for.
    """

    def __init__(self, dataset: Dataset, positions: NDArray[np.integer[Any]]):
        self.dataset = dataset
        self.positions = np.asarray(positions, np.int32)  # row numbers fit (check_rows), in half the memory

    @property
    def name(self) -> str:
        """Name of the whole, for messages."""
        return self.dataset.name

    @property
    def content_hash(self) -> str:
        """Hash of the whole."""
        return self.dataset.content_hash

    def __len__(self) -> int:
        """Return the number of rows of the view."""
        return len(self.positions)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows of the view."""
        return self.dataset.rows(self.positions[indices])
