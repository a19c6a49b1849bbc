"""Documents from numpy arrays: strings, or rows of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import FIELD
from bilevel.data.opening import Place, open_bytes
from bilevel.types import UserError

_BLOCK = 4096


def array_documents(path: Place, field: str) -> Iterator[bytes]:
    """The documents of a `.npy` file, or of the array `field` of a `.npz` file.

    An array of strings (`U` or `S`), `[n]`, holds a document each; an array uint8 `[n, T]` holds the UTF-8 bytes of a
    document in each row, with zeros after its end.

    Raises:
        UserError: the file has no such array, or one of another type; or a document is not UTF-8.
    """
    array = _open(path, field)
    strings = array.ndim == 1 and array.dtype.kind in "US"
    if not strings and not (array.ndim == 2 and array.dtype == np.uint8):
        raise UserError(
            f"{path} holds {array.dtype}{list(array.shape)}, not text: give an array of strings [n], or uint8 [n, T]."
        )
    if not len(array):
        raise UserError(f"{path} has no rows; give an array with text in it.")
    for start in range(0, len(array), _BLOCK):
        for offset, row in enumerate(np.asarray(array[start : start + _BLOCK])):
            yield _text(row, path, start + offset)


def _open(path: Place, field: str) -> NDArray[Any]:
    try:
        file: Any = open_bytes(path, decompress=False) if isinstance(path, str) else path
        stored = np.load(file, mmap_mode=None if isinstance(path, str) else "r", allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            return stored
        with stored:
            if field in stored.files:
                return stored[field]
            names = ", ".join(stored.files)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as numpy arrays ({error}); save it again with numpy.save.") from error
    raise UserError(f"{path} holds no array {field!r} but {names}; name the one with the text as the field ({FIELD}).")


def _text(row: Any, path: Place, number: int) -> bytes:
    text = row.encode() if isinstance(row, str) else bytes(row).rstrip(b"\0")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"Row {number} of {path} is not UTF-8 ({error.reason}); convert it, or leave it out."
        ) from error
    return b"" if not text.strip() else text
