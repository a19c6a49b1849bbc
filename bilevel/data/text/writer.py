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
from bilevel.data.text.rows import Rows, cut_rows, document_blocks
from bilevel.data.text.tokenizers import TextTokenizer, token_type
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
    """Cuts documents into windows and writes them to `folder`; `add` every document, then `close`.

    Args:
        folder: where the arrays are written.
        length: T, the bytes or tokens of a row.
        labelled: whether documents have labels.
        tokenizer: what cuts documents into tokens; None: bytes.
        prompts: whether documents may begin with a prompt; rows of nothing else are left out, and counted.
    """

    def __init__(
        self,
        folder: Path,
        length: int,
        *,
        labelled: bool,
        tokenizer: TextTokenizer | None = None,
        prompts: bool = False,
    ):
        self.length = length
        self.documents = 0
        self.empty_documents = 0
        self.bytes = 0
        self.unanswered_rows = 0
        self.unknown_tokens = 0
        self.label_names: dict[str, int] = {}
        self._tokenizer, self._prompts = tokenizer, prompts
        self._arrays = {
            name: GrowingArray(folder / f"{name}.npy", dtype, shape)
            for name, (dtype, shape) in array_types(length, tokenizer, labelled=labelled, prompts=prompts).items()
        }
        self._hashes = {
            name: hashlib.blake2b(digest_size=16)
            for name in ("tokens", "length", "size", "given")
            if name in self._arrays
        }

    def add_all(self, documents: Iterable[Document]) -> None:
        """Write all documents, about 1 MiB at a time."""
        for block in document_blocks(documents):
            self._add_block(block)

    def _add_block(self, block: list[Document]) -> None:
        self.empty_documents += sum(not document.text for document in block)
        self.bytes += sum(len(document.text) for document in block)
        labels = np.array([self._label_number(document) for document in block], np.int32)
        hashes = np.array([text_hash(document.text) >> 32 for document in block], np.uint32)
        texts = [document.text for document in block]
        prompts = [document.prompt for document in block] if self._prompts else None
        for rows in cut_rows(texts, self.length, tokenizer=self._tokenizer, prompts=prompts):
            kept = rows.given < rows.length
            self.unanswered_rows += int((~kept).sum())
            if not kept.all():
                rows = Rows(*(x[kept] for x in rows))  # pyright: ignore[reportArgumentType]
            self._append(rows, self.documents + rows.owner, hashes[rows.owner], labels[rows.owner])
        self.documents += len(block)

    def _append(
        self, rows: Rows, document: NDArray[np.int64], hashes: NDArray[np.uint32], labels: NDArray[np.int32]
    ) -> None:
        if self._tokenizer is not None and self._tokenizer.unknown is not None:
            real = np.arange(self.length) < rows.length[:, None]
            self.unknown_tokens += int(((rows.tokens == self._tokenizer.unknown) & real).sum())
        found = {
            "tokens": rows.tokens, "length": rows.length, "size": rows.size, "given": rows.given, "document": document,
            "hash": hashes, "label": labels,
        }  # fmt: skip
        for name, array in self._arrays.items():
            array.append(found[name])
        for name, hasher in self._hashes.items():
            hasher.update(np.ascontiguousarray(found[name]).data)

    def _label_number(self, document: Document) -> int:
        label = document.label
        if label is None or "label" not in self._arrays or not document.text:
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
        return self._arrays["tokens"].count

    @property
    def content_hash(self) -> str:
        """A digest of the rows; the same for the same rows, however they were read."""
        both = b"".join(hasher.digest() for hasher in self._hashes.values()) + self.length.to_bytes(8, "little")
        tokenizer = b"" if self._tokenizer is None else self._tokenizer.fingerprint.encode()
        return hashlib.blake2b(both + tokenizer, digest_size=16).hexdigest()

    def close(self) -> None:
        """Finish the files."""
        with contextlib.ExitStack() as stack:
            for array in self._arrays.values():
                stack.callback(array.close)


def array_types(
    length: int, tokenizer: TextTokenizer | None, *, labelled: bool, prompts: bool
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return the type and the shape of a row of each array of a packed text."""
    found: dict[str, tuple[Any, tuple[int, ...]]] = {
        "tokens": (token_type(tokenizer), (length,)),
        "length": (length_dtype(length), ()),
        "document": (np.int64, ()),
        "hash": (np.uint32, ()),
    }
    if tokenizer is not None or prompts:
        found["size"] = (np.int32, ())
    if prompts:
        found["given"] = (np.int32, ())
    return {**found, "label": (np.int32, ())} if labelled else found


def length_dtype(length: int) -> type[np.uint16] | type[np.int32]:
    """The type of `length.npy` for rows of `length` tokens."""
    return np.uint16 if length <= np.iinfo(np.uint16).max else np.int32
