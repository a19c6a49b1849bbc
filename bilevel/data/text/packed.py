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
from bilevel.data.notes import note
from bilevel.data.opening import Place, exists, place_of
from bilevel.data.packed_folder import PackedFolder, packed_folder
from bilevel.data.text.files import file_fingerprint
from bilevel.data.text.labels import read_faults, with_labels
from bilevel.data.text.tokenizers import TextTokenizer
from bilevel.data.text.writer import PackedWriter, array_types
from bilevel.types import UserError

FORMAT_VERSION = 3


@dataclass(frozen=True)
class PackedText(PackedFolder):
    """Rows of bytes, or of a tokenizer's tokens, in memory-mapped arrays; made by `pack`.

    A row is a window of T consecutive bytes, or tokens, of one document; of rows that cross the borders of documents, the
    document, the hash and the label are those of the first one in it. The manifest has source, tokenizer, length, row_count,
    document_count, empty_documents, byte_count, prompts, crossing, unanswered_rows, unknown_tokens, content_hash, label_names
    (None without labels) and format_version.
    """

    tokens: NDArray[Any]
    """uint8 `[N, T]` of bytes, uint16 or uint32 of a tokenizer; zero beyond `length`."""
    length: NDArray[Any]
    """uint16 (int32 if T is larger) `[N]`: the real tokens of each row."""
    document: NDArray[np.int64]
    """int64 `[N]`: the number of each row's document in the source, blank documents counted."""
    hash: NDArray[np.uint32]
    """uint32 `[N]`: the upper half of `text_hash` of each row's document; chooses documents whatever their order."""
    size: NDArray[np.int32] | None
    """int32 `[N]`: the bytes of text in each row, those of a prompt left out; None where they are its length."""
    given: NDArray[np.int32] | None
    """int32 `[N]`: the tokens at the beginning of each row that are of a prompt; None without prompts."""
    labels: NDArray[np.int32] | None
    """int32 `[N]`: positions in `label_names`; None if the documents have no labels."""
    tokenizer: TextTokenizer | None = None
    """What cut the documents; None: bytes."""

    @classmethod
    def open(cls, folder: Path, tokenizer: TextTokenizer | None = None) -> PackedText:
        """Open a packed folder.

        Raises:
            UserError: the folder is damaged: a file is missing, or does not have the shape that the manifest
                states.
        """
        with packed_folder(folder, "text", FORMAT_VERSION) as packed:
            manifest = packed.manifest
            labelled, prompts = manifest["label_names"] is not None, manifest["prompts"]
            more = {"labelled": labelled, "prompts": prompts, "crossing": manifest["crossing"]}
            types = array_types(manifest["length"], tokenizer, **more)
            found: dict[str, Any] = {
                name: packed.array(name, dtype, manifest["row_count"], *shape) for name, (dtype, shape) in types.items()
            }
            return cls(
                folder, manifest, size=found.pop("size", None), given=found.pop("given", None),
                labels=found.pop("label", None), tokenizer=tokenizer, **found,
            )  # fmt: skip

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels in the order of their first appearance; empty without labels."""
        return tuple(self.manifest["label_names"] or ())

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        Returns:
            tokens `[b, T]`, length int32 `[b]`, id int32 `[b]` (the row numbers); size and given int32 `[b]`, where there are
            such.
        """
        more = {"size": self.size, "given": self.given}
        return {
            "tokens": take_rows(self.tokens, indices),
            "length": take_rows(self.length, indices).astype(np.int32),
            **{name: take_rows(array, indices) for name, array in more.items() if array is not None},
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
        tokens = self.tokens[row, : self.length[row]]
        return tokens.tobytes().decode("utf-8", "replace") if self.tokenizer is None else self.tokenizer.decode(tokens)


def pack(
    source: Source,
    *,
    length: int,
    cache_dir: str | Path,
    labels: str | Path | None = None,
    tokenizer: TextTokenizer | None = None,
    prompts: bool = False,
    crossing: bool = False,
) -> PackedText:
    """Cut the documents of `source` into rows and keep them in `cache_dir`; a second call only opens them.

    A row is one of the consecutive windows of `length` bytes, or tokens, of a document. A last window shorter than
    `min(16, length)` is dropped unless it is the document's only one; blank documents are skipped and
    counted. The folder in `cache_dir` is named after the fingerprints, the length and the format version, and
    appears in one piece: a killed packing leaves only a temporary folder, and of several processes that pack
    at once one publishes its result. A damaged folder is packed again.

    Args:
        source: the documents.
        length: T, the bytes or tokens of a row.
        cache_dir: made if it does not exist.
        labels: a table with tab-separated columns (gzip or not) whose line i holds, in its first column, the
            label of document i; by default the source's own labels, if it has any.
        tokenizer: what cuts documents into tokens; None: bytes.
        prompts: whether documents may begin with a prompt. Rows of nothing else are left out, and counted in a note.
        crossing: whether a row goes on from one document to the next, with byte 0, or the tokenizer's end of a document, behind
            each; not together with prompts. The 50th of the documents with the smallest hashes shares no row with the others.

    Returns:
        The rows.

    Raises:
        UserError: the source or the labels are broken or do not match, or `length` is not positive.
    """
    if length < 1:
        raise UserError(f"The row length is {length}; it must be at least 1.")
    table = place_of(labels) if labels is not None else None
    if table is not None and not exists(table):
        raise UserError(
            f"The label file {table} does not exist; check the path, or leave the labels out (--data.generic-labels)."
        )
    parts = ["packed", FORMAT_VERSION, length, source.fingerprint(), file_fingerprint(table) if table else ""]
    key = digest([*parts, "" if tokenizer is None else tokenizer.fingerprint, int(prompts), int(crossing)])
    packed = cached_folder(
        Path(cache_dir) / f"{'bytes' if tokenizer is None else 'tokens'}-{length}-{key}",
        lambda folder: PackedText.open(folder, tokenizer),
        lambda temporary: _write(
            temporary, source, length, table, tokenizer=tokenizer, prompts=prompts, crossing=crossing
        ),
        work=f"Packing {source.name}",
    )
    _note_what_is_missing(packed)
    return packed


def _write(
    folder: Path,
    source: Source,
    length: int,
    labels: Place | None,
    *,
    tokenizer: TextTokenizer | None,
    prompts: bool,
    crossing: bool,
) -> None:
    documents = source.read()
    labelled = source.labelled or labels is not None
    how: dict[str, Any] = {"tokenizer": tokenizer, "prompts": prompts, "crossing": crossing}
    writer = PackedWriter(folder, length, labelled=labelled, **how)
    with contextlib.closing(writer):
        writer.add_all(documents if labels is None else with_labels(documents, labels, source.name))
    check_rows(writer.row_count, source.name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "tokenizer": "bytes" if tokenizer is None else tokenizer.name,
        "length": length,
        "row_count": writer.row_count,
        "document_count": writer.documents - writer.empty_documents,
        "empty_documents": writer.empty_documents,
        "byte_count": writer.bytes,
        "prompts": prompts,
        "crossing": crossing,
        "unanswered_rows": writer.unanswered_rows,
        "unknown_tokens": writer.unknown_tokens,
        "content_hash": writer.content_hash,
        "label_names": list(writer.label_names) if labelled else None,
    }
    text = json.dumps(manifest, indent=1)  # ASCII: names of files need not be UTF-8
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _note_what_is_missing(packed: PackedText) -> None:
    """Say what of a text no loss is of."""
    unanswered, unknown = packed.manifest["unanswered_rows"], packed.manifest["unknown_tokens"]
    if unanswered:
        note(f"{unanswered:,} rows of {packed.name} hold a prompt alone and are left out; longer rows: --data.length.")
    if unknown:
        note(
            f"{unknown:,} tokens of {packed.name} are the one for what {packed.manifest['tokenizer']} does not know: their "
            "losses are not of their text."
        )
