"""Which rows every step trained on, in a file that grows while training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError

_TYPE = np.dtype("<i4")


class SequenceRecorder:
    """Keeps the row numbers of all steps, for `save_sequence`.

    It is an `on_selected` of `train`.

    Each step has its place in the file, so that a run that was killed and goes on from a checkpoint writes the steps after it
    again where they were.

    Args:
        path: the file; created with the first rows.
        batch_size: b, rows in a step.
        ids: int `[N]`, the ids of the rows drawn from, where they are not their numbers (those of a `RowView`).
    """

    def __init__(self, path: str | Path, batch_size: int, ids: NDArray[np.integer] | None = None):
        self._path = Path(path)
        self._batch_size = batch_size
        self._ids = ids
        self._order = None if ids is None else np.argsort(ids, kind="stable")

    def __call__(self, ids: NDArray[np.integer], step: int) -> Mapping[str, float]:
        """Write the rows of some steps.

        Args:
            ids: int32 `[n * b]`, in order; −1 at places without a row.
            step: the last of the n steps, counted from 1.

        Returns:
            No metrics.

        Raises:
            UserError: the steps before them are not in the file, or it cannot be written.
        """
        if self._ids is not None and self._order is not None:
            places = np.searchsorted(self._ids, np.maximum(ids, self._ids.min()), sorter=self._order)
            ids = np.where(ids < 0, -1, self._order[places])
        begin = (step * self._batch_size - ids.size) * _TYPE.itemsize
        try:
            self._path.touch()
            with self._path.open("r+b") as file:
                if self._path.stat().st_size < begin:
                    raise UserError(
                        f"{self._path} lacks rows of the steps before step {step}, which the run goes on from: "
                        "give another --run-dir, and train from the start."
                    )
                file.seek(begin)
                file.truncate()
                file.write(ids.astype(_TYPE).tobytes())
        except OSError as error:
            raise UserError(
                f"Cannot write {self._path} ({error.strerror}): check the permissions and the free space there."
            ) from error
        return {}

    def sequence(self) -> NDArray[np.int32]:
        """Return the rows of all steps so far, int32 `[steps, b]`.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return np.fromfile(self._path, _TYPE).astype(np.int32).reshape(-1, self._batch_size)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} does not hold the rows of a run ({error}): train again.") from error
