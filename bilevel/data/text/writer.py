"""Writes the arrays of a packed text, in chunks, without knowing the number of rows beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bilevel.data.digests import Document, text_hash
from bilevel.data.text.rows import cut_rows, document_blocks
from bilevel.types import UserError

_MOST_LABELS = 10_000


class GrowingArray:
    """A `.npy` file of rows whose number is written at the end."""

    def __init__(self, path: Path, dtype: DTypeLike, row_shape: tuple[int, ...] = ()):
        self._file: BinaryIO = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self.count = 0
        self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows, `[n, *row_shape]`."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.count += len(rows)

    def close(self) -> None:
        """Write the final header and close the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def _write_header(self) -> None:
        # The fixed length of 128 bytes lets the final header replace the first one.
        shape = (self.count, *self._row_shape)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
        self._file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode("ascii") + b"\n")


class PackedWriter:
    """Cuts documents into windows and writes them to `folder`; `add` every document, then `close`."""

    def __init__(self, folder: Path, length: int, *, labelled: bool):
        self.length = length
        self.documents = 0
        self.empty_documents = 0
        self.bytes = 0
        self.label_names: dict[str, int] = {}
        self._tokens = GrowingArray(folder / "tokens.npy", np.uint8, (length,))
        self._lengths = GrowingArray(folder / "length.npy", length_dtype(length))
        self._numbers = GrowingArray(folder / "document.npy", np.int64)
        self._hashes = GrowingArray(folder / "hash.npy", np.uint32)
        self._labels = GrowingArray(folder / "label.npy", np.int32) if labelled else None
        self._token_hash = hashlib.blake2b(digest_size=16)
        self._length_hash = hashlib.blake2b(digest_size=16)

    def add_all(self, documents: Iterable[Document]) -> None:
        """Write all documents, about 1 MiB at a time."""
        for block in document_blocks(documents):
            self._add_block(block)

    def _add_block(self, block: list[Document]) -> None:
        self.empty_documents += sum(not document.text for document in block)
        self.bytes += sum(len(document.text) for document in block)
        labels = np.array([self._label_number(document) for document in block], np.int32)
        hashes = np.array([text_hash(document.text) >> 32 for document in block], np.uint32)
        for rows in cut_rows([document.text for document in block], self.length):
            self._tokens.append(rows.tokens)
            self._lengths.append(rows.length)
            self._numbers.append(self.documents + rows.owner)
            self._hashes.append(hashes[rows.owner])
            self._token_hash.update(rows.tokens.data)
            self._length_hash.update(rows.length.data)
            if self._labels is not None:
                self._labels.append(labels[rows.owner])
        self.documents += len(block)

    def _label_number(self, document: Document) -> int:
        label = document.label
        if label is None or self._labels is None or not document.text:
            return -1  # appears in no row
        number = self.label_names.setdefault(label, len(self.label_names))
        if number >= _MOST_LABELS:
            raise UserError(
                f"There are more than {_MOST_LABELS} different labels (one is {label[:40]!r}); the label "
                "must be the first column of the label file (--data.generic-labels) and name the document's domain."
            )
        return number

    @property
    def row_count(self) -> int:
        """The number of rows written."""
        return self._tokens.count

    @property
    def content_hash(self) -> str:
        """A digest of the rows; the same for the same rows, however they were read."""
        both = self._token_hash.digest() + self._length_hash.digest() + self.length.to_bytes(8, "little")
        return hashlib.blake2b(both, digest_size=16).hexdigest()

    def close(self) -> None:
        """Finish the files."""
        with contextlib.ExitStack() as stack:
            for array in (self._tokens, self._lengths, self._numbers, self._hashes, self._labels):
                if array is not None:
                    stack.callback(array.close)


def length_dtype(length: int) -> type[np.uint16] | type[np.int32]:
    """The type of `length.npy` for rows of `length` bytes."""
    return np.uint16 if length <= np.iinfo(np.uint16).max else np.int32
