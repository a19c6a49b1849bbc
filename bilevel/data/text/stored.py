"""What is common to files of documents: their records can be read, and written again in the same format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

ID_FIELD = "--id-field"


class Chosen(NamedTuple):
    """Which records are written."""

    kept: NDArray[np.bool_]
    """bool `[n]`, by the number of the record; those beyond are not kept."""
    weight: NDArray[np.float32] | None = None
    """float32 `[n]`: written as one more field."""
    weight_field: str = "weight"

    def of(self, start: int, count: int) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
        """Return what concerns `count` records from number `start` on: which are kept, and the weights of these."""
        kept = np.zeros(count, bool)
        found = self.kept[start : start + count]
        kept[: len(found)] = found
        return kept, None if self.weight is None else self.weight[start : start + count][found]


class Stored(Protocol):
    """A file in which record i, a line or a row, holds document i."""

    def texts(self, field: str | None) -> Iterator[bytes]:
        """Stream the UTF-8 text of each record, b"" for a blank one; `field` as for `open_source`."""
        ...

    def fields(self) -> list[str]:
        """Return the names of the fields of the first record; of plain text, what it is called where it becomes a field."""
        ...

    def keys(self, field: str | None, flag: str = ID_FIELD) -> Iterator[Any]:
        """Stream what identifies the records, in lists or arrays: the values of a field, or the numbers of the records.

        `flag` is where the user names the field, for messages.
        """
        ...

    def name(self, stem: str, *, plain: bool) -> str:
        """Return the name of a file like this one, with the records alone (`plain`) or with fields of ours."""
        ...

    def write(self, target: Path, chosen: Chosen) -> Iterator[int]:
        """Write the chosen records to a file in the same format; yields how many, some at a time."""
        ...

    def write_columns(self, target: Path, blocks: Iterable[Mapping[str, Any]]) -> Iterator[int]:
        """Write other records in the format of the file.

        Args:
            target: where to.
            blocks: by name, lists or arrays of one length.

        Yields:
            How many are written, some at a time.
        """
        ...
