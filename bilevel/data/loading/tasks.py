"""Batches that come from one of several data sets each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import NumpyBatch
from bilevel.data.loading.joined import JoinedData
from bilevel.data.loading.loader import Loader
from bilevel.types import UserError


class TaskLoader:
    """Draws each batch from one of several data sets, chosen at random.

    A pure function of (seed, step), as for `Loader`.

    Args:
        dataset: the data sets, one for each of T tasks.
        batch_size: rows of the global batch, over all processes.
        seed: not negative; selects the tasks and the order of the rows.
        weights: the chances of the tasks, in proportion; None: all alike.
        process_index: as for `Loader`.
        process_count: as for `Loader`.

    Raises:
        UserError: the weights are no T finite numbers from 0 on with a positive sum, or as `Loader`, for any of the data sets.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    appendix B.
    """

    def __init__(
        self,
        dataset: JoinedData,
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._loaders = [
            Loader(part, batch_size, seed=seed, process_index=process_index, process_count=process_count)
            for part in dataset.parts.values()
        ]
        self._ends = np.cumsum(_chances(weights, list(dataset.parts)))

    def task(self, step: int) -> int:
        """Return the number of the data set that batch `step` (from 0) comes from."""
        key = np.random.SeedSequence((self.seed, step))
        draw = np.random.Generator(np.random.Philox(key)).random()
        return int(np.searchsorted(self._ends, draw * self._ends[-1], side="right"))

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of global batch `step` (from 0) in the joined data.

        int64 `[batch_size]`.
        """
        task = self.task(step)
        return self._loaders[task].indices(step) + self.dataset.starts[task]

    def batch(self, step: int) -> NumpyBatch:
        """Load this process's slice of the batch `step` (from 0).

        Its `id` are row numbers in the joined data.
        """
        task = self.task(step)
        batch = self._loaders[task].batch(step)
        return {**batch, "id": batch["id"] + np.int32(self.dataset.starts[task])}


def _chances(weights: Sequence[float] | None, names: Sequence[str]) -> NDArray[np.float64]:
    """The chances of the tasks, float64 `[T]`, of sum 1."""
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    valid = all(math.isfinite(weight) and weight >= 0 for weight in given)
    if len(given) != len(names) or not valid or not sum(given) > 0:
        raise UserError(
            f"The task weights are {given} for {len(names)} data sets ({', '.join(names)}); give one finite number from 0 on "
            "for each, not all of them 0."
        )
    return np.asarray(given) / sum(given)
