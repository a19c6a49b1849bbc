"""Text packed to memory-mapped arrays: read and cut once, opened in no time afterwards."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import Source, digest
from bilevel.data.loading.arrays import NumpyBatch, check_rows, take_rows
from bilevel.data.opening import Place, exists, place_of
from bilevel.data.packed_folder import PackedFolder, packed_folder
from bilevel.data.text.files import file_fingerprint
from bilevel.data.text.labels import read_faults, with_labels
from bilevel.data.text.writer import PackedWriter, length_dtype
from bilevel.types import UserError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class PackedText(PackedFolder):
    """Rows of bytes in memory-mapped arrays; made by `pack`.

    A row is a window of T consecutive bytes of one document. The manifest has source, tokenizer, length, row_count,
    document_count, empty_documents, byte_count, content_hash (of the tokens and lengths), label_names (None without labels) and
    format_version.
    """

    tokens: NDArray[np.uint8]
    """uint8 `[N, T]`, zero beyond `length`."""
    length: NDArray[Any]
    """uint16 (int32 if T is larger) `[N]`: the real bytes of each row."""
    document: NDArray[np.int64]
    """int64 `[N]`: the number of each row's document in the source, blank documents counted."""
    hash: NDArray[np.uint32]
    """uint32 `[N]`: the upper half of `text_hash` of each row's document; chooses documents whatever their order."""
    labels: NDArray[np.int32] | None
    """int32 `[N]`: positions in `label_names`; None if the documents have no labels."""

    @classmethod
    def open(cls, folder: Path) -> PackedText:
        """Open a packed folder.

        Raises:
            UserError: the folder is damaged: a file is missing, or does not have the shape that the manifest
                states.
        """
        with packed_folder(folder, "text", FORMAT_VERSION) as packed:
            manifest, read = packed.manifest, packed.array
            rows, length = manifest["row_count"], manifest["length"]
            return cls(
                folder,
                manifest,
                read("tokens", np.uint8, rows, length),
                read("length", length_dtype(length), rows),
                read("document", np.int64, rows),
                read("hash", np.uint32, rows),
                None if manifest["label_names"] is None else read("label", np.int32, rows),
            )

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels in the order of their first appearance; empty without labels."""
        return tuple(self.manifest["label_names"] or ())

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        Returns:
            tokens uint8 `[b, T]`, length int32 `[b]`, id int32 `[b]` (the row numbers).
        """
        return {
            "tokens": take_rows(self.tokens, indices),
            "length": take_rows(self.length, indices).astype(np.int32),
            "id": np.asarray(indices, np.int32),
        }

    def faults(self, table: str | Path) -> NDArray[np.int8]:
        """Read what a table beside the text says of each row's document: 0 right, 1 wrong, −1 not known, int8 `[N]`.

        Args:
            table: its line i, in the first of its tab-separated columns, is about document i: right or 0, wrong or 1, or nothing.

        Raises:
            UserError: there is no such table, it says something else, or it is of other documents.
        """
        place = place_of(table)
        if not exists(place):
            raise UserError(f"The fault file {place} does not exist; check the path, or leave it out.")
        count = self.manifest["document_count"] + self.manifest["empty_documents"]
        return read_faults(place, count, self.name)[self.document]

    def text(self, row: int) -> str:
        """The text of a row; characters cut at its ends appear as U+FFFD."""
        return self.tokens[row, : self.length[row]].tobytes().decode("utf-8", "replace")


def pack(source: Source, *, length: int, cache_dir: str | Path, labels: str | Path | None = None) -> PackedText:
    """Cut the documents of `source` into rows and keep them in `cache_dir`; a second call only opens them.

    A row is one of the consecutive windows of `length` bytes of a document. A last window shorter than
    `min(16, length)` bytes is dropped unless it is the document's only one; blank documents are skipped and
    counted. The folder in `cache_dir` is named after the fingerprints, the length and the format version, and
    appears in one piece: a killed packing leaves only a temporary folder, and of several processes that pack
    at once one publishes its result. A damaged folder is packed again.

    Args:
        source: the documents.
        length: T, the bytes of a row.
        cache_dir: made if it does not exist.
        labels: a table with tab-separated columns (gzip or not) whose line i holds, in its first column, the
            label of document i; by default the source's own labels, if it has any.

    Returns:
        The rows.

    Raises:
        UserError: the source or the labels are broken or do not match, or `length` is not positive.
    """
    if length < 1:
        raise UserError(f"The row length is {length}; it must be at least 1 byte.")
    table = place_of(labels) if labels is not None else None
    if table is not None and not exists(table):
        raise UserError(
            f"The label file {table} does not exist; check the path, or leave the labels out (--data.generic-labels)."
        )
    key = digest(["packed", FORMAT_VERSION, length, source.fingerprint(), file_fingerprint(table) if table else ""])
    folder = Path(cache_dir) / f"bytes-{length}-{key}"
    return cached_folder(
        folder,
        PackedText.open,
        lambda temporary: _write(temporary, source, length, table),
        work=f"Packing {source.name}",
    )


def _write(folder: Path, source: Source, length: int, labels: Place | None) -> None:
    documents = source.read()
    labelled = source.labelled or labels is not None
    writer = PackedWriter(folder, length, labelled=labelled)
    with contextlib.closing(writer):
        writer.add_all(documents if labels is None else with_labels(documents, labels, source.name))
    check_rows(writer.row_count, source.name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "tokenizer": "bytes",
        "length": length,
        "row_count": writer.row_count,
        "document_count": writer.documents - writer.empty_documents,
        "empty_documents": writer.empty_documents,
        "byte_count": writer.bytes,
        "content_hash": writer.content_hash,
        "label_names": list(writer.label_names) if labelled else None,
    }
    text = json.dumps(manifest, indent=1)  # ASCII: names of files need not be UTF-8
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
