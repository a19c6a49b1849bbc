"""Writes the arrays of packed pairs, a block of pairs at a time."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel.data.loading.arrays import check_rows
from bilevel.data.pairs.stream import Pair, PairSource, pair_hash
from bilevel.data.pairs.tokenizer import EOS, PairTokenizer
from bilevel.data.text.writer import GrowingArray
from bilevel.types import UserError

FORMAT_VERSION = 1
_BLOCK = 1 << 14  # pairs tokenised at once
_MOST_LABELS = 10_000
_MOST_OF_UINT16 = 1 << 16
_REASONS = ("empty", "long", "ratio", "copy", "repeated")


class Limits(NamedTuple):
    """Which pairs are dropped."""

    length: int
    max_ratio: float | None
    drop_copies: bool
    drop_repeats: bool


def write_pairs(
    folder: Path, source: PairSource, tokenizers: tuple[PairTokenizer, PairTokenizer], limits: Limits
) -> None:
    """Write the arrays and the manifest of `PackedPairs` to an empty folder.

    Raises:
        UserError: no pair is left, or as reading the source.
    """
    largest = max(tokenizer.size for tokenizer in tokenizers)
    token_type = np.dtype(np.uint16 if largest <= _MOST_OF_UINT16 else np.int32)
    writer = _Writer(folder, tokenizers, limits, token_type, source.label_kinds)
    with contextlib.closing(writer):
        for block in _blocks(source.read()):
            writer.add(block)
    if not writer.rows:
        raise UserError(_nothing_left(source, writer, limits))
    check_rows(writer.rows, source.name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "languages": list(source.languages),
        "tokenizers": [tokenizer.fingerprint for tokenizer in tokenizers],
        "vocabulary": largest,
        "token_type": token_type.name,
        "length": limits.length,
        "max_ratio": limits.max_ratio or 0,
        "row_count": writer.rows,
        "pair_count": writer.pairs,
        "dropped": {reason: writer.dropped[reason] for reason in _REASONS},
        "content_hash": writer.content_hash(),
        "label_names": {kind: list(names) for kind, names in writer.label_names.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _blocks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while block := list(itertools.islice(pairs, _BLOCK)):
        yield block


class _Writer:
    def __init__(
        self,
        folder: Path,
        tokenizers: tuple[PairTokenizer, PairTokenizer],
        limits: Limits,
        token_type: np.dtype,
        label_kinds: Sequence[str],
    ):
        self.pairs = self.rows = 0
        self.missing = [0, 0]
        """Pairs without a source, and without a target."""
        self.dropped: Counter[str] = Counter()
        self.label_names: dict[str, dict[str, int]] = {kind: {} for kind in label_kinds}
        self._tokenizers, self._limits, self._token_type = tokenizers, limits, token_type
        self._seen: set[int] = set()
        types = {"tokens": token_type, "starts": np.int64, "text": np.uint8, "text_starts": np.int64}
        types |= {"hash": np.uint64, "number": np.int64} | dict.fromkeys(label_kinds, np.int32)
        self._arrays = {name: GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in types.items()}
        self._ends = {"tokens": 0, "text": 0}
        for name in ("starts", "text_starts"):
            self._arrays[name].append(np.zeros(1, np.int64))
        settings = [str(limits.length), *(tokenizer.fingerprint for tokenizer in tokenizers)]
        self._hashes = [hashlib.blake2b(" ".join(settings).encode(), digest_size=16) for _ in range(2)]

    def add(self, block: list[Pair]) -> None:
        """Tokenise pairs and write those that are kept."""
        source_tokenizer, target_tokenizer = self._tokenizers
        sides = (
            source_tokenizer.encode([pair.source for pair in block]),
            target_tokenizer.encode([pair.target for pair in block]),
        )
        kept: list[int] = []
        for number, (pair, source, target) in enumerate(zip(block, *sides, strict=True)):
            reason = self._reason(pair, len(source), len(target))
            if reason:
                self.dropped[reason] += 1
            else:
                kept.append(number)
        rows = [[*side[number], EOS] for number in kept for side in sides]
        flat = np.fromiter(itertools.chain.from_iterable(rows), self._token_type)
        self._append("tokens", flat, [len(row) for row in rows], hashed=True)
        texts = [
            text.encode("utf-8", "replace") for number in kept for text in (block[number].source, block[number].target)
        ]
        self._append("text", np.frombuffer(b"".join(texts), np.uint8), [len(text) for text in texts])
        self._arrays["hash"].append(np.array([pair_hash(block[number].source) for number in kept], np.uint64))
        self._arrays["number"].append(np.array(kept, np.int64) + self.pairs)
        for place, (kind, names) in enumerate(self.label_names.items()):
            values = [names.setdefault(block[number].labels[place], len(names)) for number in kept]
            self._arrays[kind].append(np.array(values, np.int32))
            if len(names) > _MOST_LABELS:
                raise UserError(_too_many_labels(kind, next(reversed(names))))
        self.pairs += len(block)
        self.rows += len(kept)

    def _append(self, name: str, flat: np.ndarray, sizes: list[int], *, hashed: bool = False) -> None:
        ends = self._ends[name] + np.cumsum(sizes, dtype=np.int64)
        self._arrays[name].append(flat)
        self._arrays["starts" if name == "tokens" else "text_starts"].append(ends)
        if len(ends):
            self._ends[name] = int(ends[-1])
        if hashed:
            self._hashes[0].update(flat.astype("<i4").tobytes())
            self._hashes[1].update(ends.astype("<i8").tobytes())

    def _reason(self, pair: Pair, source: int, target: int) -> str | None:
        """Return why a pair is dropped, if it is; the sizes are pieces without eos."""
        limits = self._limits
        if not source or not target:
            self.missing[0] += not source
            self.missing[1] += not target
            return "empty"
        if max(source, target) >= limits.length:
            return "long"
        if limits.max_ratio is not None and max(source, target) > limits.max_ratio * min(source, target):
            return "ratio"
        if limits.drop_copies and pair.source == pair.target:
            return "copy"
        if limits.drop_repeats:
            both = pair_hash(f"{pair.source}\n{pair.target}")
            if both in self._seen:
                return "repeated"
            self._seen.add(both)
        return None

    def content_hash(self) -> str:
        """Return a digest of the rows."""
        return hashlib.blake2b(b"".join(h.digest() for h in self._hashes), digest_size=16).hexdigest()

    def close(self) -> None:
        """Finish the files."""
        for array in self._arrays.values():
            array.close()


def _too_many_labels(kind: str, example: str) -> str:
    return (
        f"There are more than {_MOST_LABELS} different labels of the kind {kind} (one is {example[:40]!r}); the first column of "
        "--data.generic-labels names a pair's domain, the second one its fault."
    )


def _nothing_left(source: PairSource, writer: _Writer, limits: Limits) -> str:
    for language, missing in zip(source.languages, writer.missing, strict=True):
        if writer.pairs and missing == writer.pairs:
            return (
                f"{source.name}: all {writer.pairs:,} pairs are empty in {language}; check the languages "
                "(--data.source-language, --data.target-language) and the file."
            )
    if not writer.pairs:
        return f"{source.name} holds no pairs; give data that are not empty."
    counts = ", ".join(f"{count:,} {reason}" for reason, count in writer.dropped.items())
    return (
        f"{source.name}: all {writer.pairs:,} pairs are dropped ({counts}); raise --data.length ({limits.length}) or "
        "--data.max-ratio, or check the languages."
    )
