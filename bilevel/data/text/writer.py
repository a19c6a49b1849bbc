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
from bilevel.data.loading.arrays import NumpyBatch
from bilevel.data.text.joining import HELD_OUT_SHARE, RowJoiner, end_of, with_ends
from bilevel.data.text.rows import cut_rows, document_blocks, tokens_of
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
        crossing: whether a row goes on from one document to the next, instead of being of one alone.
    """

    def __init__(
        self,
        folder: Path,
        length: int,
        *,
        labelled: bool,
        tokenizer: TextTokenizer | None = None,
        prompts: bool = False,
        crossing: bool = False,
    ):
        self.length = length
        self.documents = 0
        self.empty_documents = 0
        self.bytes = 0
        self.unanswered_rows = 0
        self.unknown_tokens = 0
        self.label_names: dict[str, int] = {}
        self._tokenizer, self._prompts = tokenizer, prompts
        self._joiners = {side: RowJoiner(length) for side in (False, True)} if crossing else None
        types = array_types(length, tokenizer, labelled=labelled, prompts=prompts, crossing=crossing)
        self._arrays = {
            name: GrowingArray(folder / f"{name}.npy", dtype, shape) for name, (dtype, shape) in types.items()
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
        self._finish()

    def _add_block(self, block: list[Document]) -> None:
        self.empty_documents += sum(not document.text for document in block)
        self.bytes += sum(len(document.text) for document in block)
        of_documents = {
            "document": self.documents + np.arange(len(block)),
            "hash": np.array([text_hash(document.text) >> 32 for document in block], np.uint32),
            "label": np.array([self._label_number(document) for document in block], np.int32),
        }
        self.documents += len(block)
        (self._cut if self._joiners is None else self._join)(block, of_documents)

    def _cut(self, block: list[Document], of_documents: NumpyBatch) -> None:
        """Write rows of one document each."""
        texts = [document.text for document in block]
        prompts = [document.prompt for document in block] if self._prompts else None
        for rows in cut_rows(texts, self.length, tokenizer=self._tokenizer, prompts=prompts):
            kept = rows.given < rows.length
            self.unanswered_rows += int((~kept).sum())
            found = rows._asdict() | {name: x[rows.owner] for name, x in of_documents.items()}
            self._append({name: x[kept] for name, x in found.items()})

    def _join(self, block: list[Document], of_documents: NumpyBatch) -> None:
        """Write rows that cross the borders of documents, but not those between documents held out and others."""
        assert self._joiners is not None
        texts = [document.text for document in block]
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        tokens = tokens_of(texts, self._tokenizer, with_starts=True)
        found, owner = with_ends(tokens, sizes, end_of(self._tokenizer))
        found |= {name: x[owner] for name, x in of_documents.items()}
        apart = found["hash"] <= int(HELD_OUT_SHARE * 2**32)
        for side, joiner in self._joiners.items():
            self._append(joiner.add({name: x[apart == side] for name, x in found.items()}))

    def _finish(self) -> None:
        """Write what is left over when all documents were added."""
        for joiner in (self._joiners or {}).values():
            for rows in joiner.finish():
                self._append(rows)

    def _append(self, rows: NumpyBatch) -> None:
        if self._tokenizer is not None and self._tokenizer.unknown is not None:
            real = np.arange(self.length) < rows["length"][:, None]
            self.unknown_tokens += int(((rows["tokens"] == self._tokenizer.unknown) & real).sum())
        for name, array in self._arrays.items():
            array.append(rows[name])
        for name, hasher in self._hashes.items():
            hasher.update(np.ascontiguousarray(rows[name]).data)

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
    length: int, tokenizer: TextTokenizer | None, *, labelled: bool, prompts: bool, crossing: bool
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return the type and the shape of a row of each array of a packed text."""
    found: dict[str, tuple[Any, tuple[int, ...]]] = {
        "tokens": (token_type(tokenizer), (length,)),
        "length": (length_dtype(length), ()),
        "document": (np.int64, ()),
        "hash": (np.uint32, ()),
    }
    if tokenizer is not None or prompts or crossing:
        found["size"] = (np.int32, ())
    if prompts:
        found["given"] = (np.int32, ())
    return {**found, "label": (np.int32, ())} if labelled else found


def length_dtype(length: int) -> type[np.uint16] | type[np.int32]:
    """The type of `length.npy` for rows of `length` tokens."""
    return np.uint16 if length <= np.iinfo(np.uint16).max else np.int32
