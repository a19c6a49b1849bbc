"""Several data sets as one, without copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.loading.arrays import Dataset, NumpyBatch, check_rows
from bilevel.types import UserError


class JoinedData:
    """The rows of several data sets, one after the other, as a data set.

    The `id` of a row is its number in the whole.

    Args:
        parts: the data sets by name, all with the same arrays (names, types and shapes of a row).

    Raises:
        UserError: there are no parts, or their arrays differ.
    """

    def __init__(self, parts: Mapping[str, Dataset]):
        if not parts:
            raise UserError("There are no data sets to join: give at least one.")
        _check_alike(parts)
        self.parts = dict(parts)
        self.name = " + ".join(parts)
        ends = np.cumsum([len(part) for part in parts.values()])
        self._size = check_rows(int(ends[-1]), self.name)
        self.starts = ends - [len(part) for part in parts.values()]
        """int64 `[T]`: the number of each part's first row."""

    @property
    def content_hash(self) -> str:
        """A digest of the hashes of the parts, in their order."""
        return digest(["joined", *(part.content_hash for part in self.parts.values())])

    def __len__(self) -> int:
        """Return the number of rows of all parts."""
        return self._size

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        The arrays of the parts, and `id`, int32 `[b]`.
        """
        return {**self.gathered(indices), "id": np.asarray(indices, np.int32)}

    def gathered(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows with the `id` that they have in their part."""
        which = np.searchsorted(self.starts, indices, side="right") - 1
        batch: NumpyBatch = {}
        for number, part in enumerate(self.parts.values()):
            places = np.flatnonzero(which == number)
            for name, rows in part.rows(indices[places] - self.starts[number]).items():
                batch.setdefault(name, np.empty((len(indices), *rows.shape[1:]), rows.dtype))[places] = rows
        return batch


def _check_alike(parts: Mapping[str, Dataset]) -> None:
    arrays = {name: _arrays(part) for name, part in parts.items()}
    (first, expected), *others = arrays.items()
    for name, found in others:
        if found != expected:
            raise UserError(
                f"{first} and {name} cannot be joined, as the arrays of their rows differ ({expected} and {found}): "
                "prepare both in the same way."
            )


def _arrays(part: Dataset) -> str:
    row = part.rows(np.zeros(1, np.int64))
    return ", ".join(f"{name} {array.dtype}{list(array.shape[1:])}" for name, array in sorted(row.items()))
