"""What the loaders read from (`Dataset`), and data sets that are arrays already."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError

NumpyBatch = dict[str, NDArray[Any]]
"""Arrays that share their leading axis b."""
_BLOCK = 1 << 24  # bytes hashed at once


class Dataset(Protocol):
    """A fixed number of rows, gathered by number."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def content_hash(self) -> str:
        """Hexadecimal digest of the rows; independent of where they are stored."""
        ...

    def __len__(self) -> int: ...

    def rows(self, indices: NDArray[np.integer[Any]], /) -> NumpyBatch:
        """Gather rows.

        Args:
            indices: row numbers, integer `[b]`, each from 0 to `len(self) - 1`.

        Returns:
            New arrays that share the leading axis b, with the row numbers as `id`, int32 `[b]`.
        """
        ...


class ArrayDataset:
    """Rows of arrays that share their leading axis, with the interface of `PackedText`.

    Args:
        arrays: the arrays, each `[N, ...]`; memory-mapped ones stay on disk. The name `id` is taken.
        name: for messages.

    Raises:
        UserError: there are no arrays or no rows, the leading axes differ, or an array holds Python objects.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], *, name: str = "arrays"):
        if not arrays:
            raise UserError(f"{name}: there are no arrays; give at least one.")
        if "id" in arrays:
            raise UserError(f"{name}: the name 'id' is taken by the row numbers; rename this array.")
        sizes: dict[str, int] = {}
        for key, array in arrays.items():
            if np.ndim(array) == 0:
                raise UserError(f"{name}: the array {key!r} is a single number; its leading axis must count the rows.")
            if np.asarray(array).dtype.hasobject:
                raise UserError(f"{name}: the array {key!r} holds Python objects; convert it to numbers.")
            sizes[key] = len(array)
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{key!r} has {size}" for key, size in sizes.items())
            raise UserError(
                f"{name}: the arrays differ in their number of rows ({found}); make the leading axes equal."
            )
        self.name = name
        self._arrays = {key: np.asarray(array) for key, array in arrays.items()}
        self._content_hash: str | None = None
        self._size = check_rows(next(iter(sizes.values())), name)

    @classmethod
    def open(cls, path: str | Path) -> ArrayDataset:
        """Open a `.npz` file (read to memory), a `.npy` file, or a folder of `.npy` files (both
        memory-mapped).

        An array from a `.npy` file is called by the name of its file.

        Raises:
            UserError: the path is missing or no such file, or as the constructor.
        """
        path = Path(os.path.expanduser(path))
        if not path.exists():
            raise UserError(f"The file {path} does not exist; check the path (it is taken relative to {Path.cwd()}).")
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    return cls({key: file[key] for key in file.files}, name=str(path))
            files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
            if not files or any(file.suffix != ".npy" for file in files):
                raise UserError(f"{path} is neither a .npz or .npy file nor a folder of .npy files; give one of these.")
            arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read as numpy arrays ({error}); write it again with numpy.") from error
        return cls(arrays, name=str(path))

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The arrays themselves, by name; not to be written to."""
        return MappingProxyType(self._arrays)

    def __len__(self) -> int:
        return self._size

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows: each array at `indices`, integer `[b]`.

        The row numbers are there as `id`, int32 `[b]`.
        """
        batch = {key: take_rows(array, indices) for key, array in self._arrays.items()}
        return {**batch, "id": np.asarray(indices, np.int32)}

    @property
    def content_hash(self) -> str:
        """A digest of names, types, shapes and bytes. The first use reads all arrays."""
        if self._content_hash is None:
            self._content_hash = self._compute_hash()
        return self._content_hash

    def _compute_hash(self) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        for key in sorted(self._arrays):
            array = self._arrays[key]
            hasher.update(f"{key} {array.dtype.str} {array.shape};".encode())
            step = max(1, _BLOCK // max(1, array[:1].nbytes))
            for start in range(0, self._size, step):
                hasher.update(np.ascontiguousarray(array[start : start + step]).tobytes())
        return hasher.hexdigest()


def take_rows(array: NDArray[Any], indices: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Take `array[indices]`.

    `take` is several times faster, but would copy the whole of a strided array first.
    """
    whole = array.flags.c_contiguous and array.flags.aligned
    return array.take(indices, axis=0) if whole else array[indices]


def check_rows(count: int, name: str) -> int:
    """Return the number of rows, if it is positive and fits int32 row numbers."""
    if count == 0:
        raise UserError(f"{name} holds no rows; give data that are not empty.")
    if count > np.iinfo(np.int32).max:
        raise UserError(f"{name} holds {count} rows, more than the {np.iinfo(np.int32).max} possible; split the data.")
    return count
