"""Batches of which a fixed part comes from a second data set."""

from __future__ import annotations

import numpy as np

from bilevel.data.arrays import NumpyBatch
from bilevel.data.loader import Loader


class MixedLoader:
    """Joins the batches of two loaders: those of `first`, then those of `second`.

    `batch(step)` is a function of the step, as for `Loader`. Both data sets have the same arrays. Where there is an array `id`,
    the rows of `second` have -1 there, as they are no rows of `first`.
    """

    def __init__(self, first: Loader, second: Loader):
        self.first, self.second = first, second
        self.batch_size = first.batch_size + second.batch_size

    def batch(self, step: int) -> NumpyBatch:
        """This process's slice of the batch `step` (from 0)."""
        first, second = self.first.batch(step), self.second.batch(step)
        if "id" in second:
            second = {**second, "id": np.full_like(second["id"], -1)}
        return {name: np.concatenate([first[name], second[name]]) for name in first}
