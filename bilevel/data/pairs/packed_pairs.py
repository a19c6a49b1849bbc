"""Sentence pairs packed to memory-mapped arrays: tokenised once, opened in no time afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import digest
from bilevel.data.loading.arrays import NumpyBatch, take_rows
from bilevel.data.notes import note
from bilevel.data.packed_folder import PackedFolder, packed_folder
from bilevel.data.pairs.pair_writer import FORMAT_VERSION, Limits, write_pairs
from bilevel.data.pairs.stream import PairSource
from bilevel.data.pairs.tokenizer import PairTokenizer
from bilevel.data.streams import RowLabels
from bilevel.types import UserError


@dataclass(frozen=True)
class PackedPairs(PackedFolder):
    """Tokenised pairs in memory-mapped arrays; made by `pack_pairs`.

    The manifest has source, languages, length, row_count, pair_count, dropped (pairs by reason), content_hash (of the tokens, the
    row length and the tokenizers), label_names, tokenizers (fingerprints) and format_version.
    """

    tokens: NDArray[Any]
    """uint16 (int32 for more than 65,536 pieces), flat: source and target of each row, each with its eos."""
    starts: NDArray[np.int64]
    """int64 `[2 N + 1]`: row i has its source from 2 i, its target from 2 i + 1."""
    hash: NDArray[np.uint64]
    """uint64 `[N]`: hash of each row's source sentence; equal for equal sentences."""
    number: NDArray[np.int64]
    """int64 `[N]`: the number of each row's pair in the source, dropped ones counted."""
    labels: Mapping[str, RowLabels]
    """By what they say: "domain" and "fault", or "language" (`multilingual_pairs`); empty without labels."""
    _text: NDArray[np.uint8]
    _text_starts: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> PackedPairs:
        """Open a folder written by `pack_pairs`; the arrays stay on disk.

        Raises:
            UserError: the folder is damaged or of another version.
        """
        with packed_folder(folder, "pairs", FORMAT_VERSION) as packed:
            manifest, read = packed.manifest, packed.array
            rows = manifest["row_count"]
            starts = read("starts", np.int64, 2 * rows + 1)
            text_starts = read("text_starts", np.int64, 2 * rows + 1)
            labels = {
                kind: RowLabels(read(kind, np.int32, rows), tuple(names))
                for kind, names in manifest["label_names"].items()
            }
            return cls(
                folder,
                manifest,
                read("tokens", np.dtype(manifest["token_type"]), int(starts[-1])),
                starts,
                read("hash", np.uint64, rows),
                read("number", np.int64, rows),
                labels,
                read("text", np.uint8, int(text_starts[-1])),
                text_starts,
            )

    @property
    def length(self) -> int:
        """The pieces of a row: S = T."""
        return self.manifest["length"]

    def __len__(self) -> int:
        return len(self.hash)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        Returns:
            source int32 `[b, S]`, source_length int32 `[b]`, target int32 `[b, T]`, target_length int32 `[b]`, and id int32
            `[b]` (the row numbers). Each side ends with eos, which counts in its length; pad 0 is behind.
        """
        indices = np.asarray(indices, np.int64)
        batch: NumpyBatch = {}
        for place, side in enumerate(("source", "target")):
            starts = take_rows(self.starts, 2 * indices + place)
            lengths = take_rows(self.starts, 2 * indices + place + 1) - starts
            positions = np.arange(self.length)
            inside = positions < lengths[:, None]
            flat = np.where(inside, starts[:, None] + positions, 0)
            batch[side] = np.where(inside, take_rows(self.tokens, flat), 0).astype(np.int32)
            batch[f"{side}_length"] = lengths.astype(np.int32)
        return {**batch, "id": indices.astype(np.int32)}

    def text(self, row: int) -> tuple[str, str]:
        """Return the source and the target sentence of a row, as they were before they were tokenised."""
        bounds = self._text_starts[2 * row : 2 * row + 3]
        source, target = (self._text[a:b].tobytes().decode("utf-8") for a, b in itertools.pairwise(bounds))
        return source, target

    def target_bytes(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Return the text of both sides of all rows as UTF-8, and where each row's target begins and how many bytes it has."""
        starts = self._text_starts[1::2]
        return self._text, starts, self._text_starts[2::2] - starts

    def targets(self) -> list[str]:
        """Return the target sentences of all rows."""
        return [self.text(i)[1] for i in range(len(self))]

    def dropped(self) -> str:
        """Say in a sentence how many pairs were dropped, and why; `""` if none were."""
        counts, length = self.manifest["dropped"], self.manifest["length"]
        said = {
            "long": f"longer than {length} pieces (--data.length)",
            "empty": "empty on one side",
            "ratio": f"with one side more than {self.manifest['max_ratio']:g} times as long as the other (--data.max-ratio)",
            "copy": "copies of their source",
            "repeated": "repeated",
        }
        reasons = ", ".join(f"{counts[reason]:,} {words}" for reason, words in said.items() if counts[reason])
        if not reasons:
            return ""
        return (
            f"{sum(counts.values()):,} of {self.manifest['pair_count']:,} pairs of {self.name} are dropped: {reasons}."
        )


def pack_pairs(
    source: PairSource,
    tokenizer: PairTokenizer,
    *,
    length: int = 32,
    cache_dir: str | Path,
    target_tokenizer: PairTokenizer | None = None,
    max_ratio: float | None = None,
    drop_copies: bool = False,
    drop_repeats: bool = False,
) -> PackedPairs:
    """Tokenise the pairs of `source` and keep them in `cache_dir`; a second call only opens them.

    Pairs that are empty on one side or longer than a row are dropped and counted, and a note says so. By default nothing else
    is dropped: which pairs are worth training on is what weights learn.

    Args:
        source: the pairs; see `hold_out`, `labelled_pairs` and `pairs_without` for what may be done before.
        tokenizer: of both sides.
        length: S = T, the most pieces of a side, with its eos.
        cache_dir: made if it does not exist.
        target_tokenizer: of the target side, if it has its own.
        max_ratio: drop pairs of which one side has more than so many times the pieces of the other, eos not counted.
        drop_copies: drop pairs whose target is the source.
        drop_repeats: drop pairs that stood there before.

    Raises:
        UserError: no pair is left, a setting is out of range, or as reading the source.
    """
    if length < 2:
        raise UserError(f"--data.length is {length}; it must be at least 2, a piece and the end of the sentence.")
    if max_ratio is not None and not max_ratio >= 1:
        raise UserError(f"--data.max-ratio is {max_ratio}; it must be at least 1.")
    tokenizers = (tokenizer, target_tokenizer or tokenizer)
    limits = Limits(length, max_ratio, drop_copies, drop_repeats)
    prints = [one.fingerprint for one in tokenizers]
    key = digest(["packed pairs", FORMAT_VERSION, *map(str, limits), *prints, source.fingerprint()])
    packed = cached_folder(
        Path(cache_dir) / f"pairs-{length}-{key}",
        PackedPairs.open,
        lambda folder: write_pairs(folder, source, tokenizers, limits),
        work=f"Packing {source.name}",
    )
    if dropped := packed.dropped():
        note(dropped)
    return packed
