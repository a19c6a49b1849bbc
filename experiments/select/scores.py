"""The first phase: a table of scores for each part of the corpus."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import Document, NumpyBatch, Rows, cut_rows, digest, document_blocks
from bilevel.training.progress import Progress
from bilevel.types import Array, UserError
from experiments.select import tables
from experiments.select.config import Config
from experiments.select.corpus import Part, content, documents_of, fingerprint, times
from experiments.select.network import Network

FORMAT_VERSION = 2
SCHEMA = pa.schema([("document", pa.int64()), ("bytes", pa.int64()), ("score", pa.float32())])
GROUP_ROWS = 1 << 16
_MOST_IN_FLIGHT = 32
_SECONDS_BETWEEN_LOOKS = 0.5


class Scored(NamedTuple):
    """Scores of some documents, in the order of the corpus."""

    document: NDArray[np.int64]
    """int64 `[n]`: numbers in the part, blank documents counted."""
    size: NDArray[np.int64]
    """int64 `[n]`: bytes of each document."""
    score: NDArray[np.float32]
    """float32 `[n]`."""


def score_documents(network: Network, documents: Iterable[Document], batch_size: int) -> Iterator[tuple[Scored, int]]:
    """Scores documents as a stream.

    Args:
      network: what scores rows.
      documents: blank ones (`b""`) get no score.
      batch_size: rows in one program call; the last one of about 1 MiB of text is padded.

    Yields:
      The scores of some documents, and the number of their rows. While the device works on them, the next are read.
    """
    number, before = 0, None
    for block in document_blocks(documents, max(1 << 20, 8 * batch_size * network.length)):
        begun = _begin(network, block, number, batch_size)
        number += len(block)
        if before is not None:
            yield _finish(before)
        before = begun
    if before is not None:
        yield _finish(before)


class _Begun(NamedTuple):
    """A block of documents whose rows are being scored."""

    first: int
    sizes: NDArray[np.int64]
    rows: list[tuple[NDArray[np.int32], NDArray[np.int64]]]
    """Lengths and owners of each batch."""
    logits: list[Array | NDArray[np.float32]]


def _begin(network: Network, block: list[Document], first: int, batch_size: int) -> _Begun:
    texts = [document.text for document in block]
    begun = _Begun(first, np.fromiter(map(len, texts), np.int64, len(texts)), [], [])
    for i, rows in enumerate(cut_rows(texts, network.length, batch_size)):
        begun.logits.append(network.logits(_padded(rows, batch_size)))
        begun.rows.append((rows.length, rows.owner))
        if i >= _MOST_IN_FLIGHT:  # one huge document must not have all its rows in flight
            begun.logits[i - _MOST_IN_FLIGHT] = np.asarray(begun.logits[i - _MOST_IN_FLIGHT])
    return begun


def _padded(rows: Rows, batch_size: int) -> NumpyBatch:
    missing = batch_size - len(rows.tokens)
    return {
        "tokens": np.pad(rows.tokens, ((0, missing), (0, 0))) if missing else rows.tokens,
        "length": np.pad(rows.length, (0, missing), constant_values=1),
    }


def _finish(begun: _Begun) -> tuple[Scored, int]:
    count = len(begun.sizes)
    total, weight, rows_done = np.zeros(count), np.zeros(count), 0
    for (length, owner), logits in zip(begun.rows, begun.logits, strict=True):
        real = np.asarray(logits)[: len(owner)].astype(np.float64)
        total += np.bincount(owner, length * real, count)
        weight += np.bincount(owner, length, count)
        rows_done += len(owner)
    chosen = np.flatnonzero(weight)
    score = (total[chosen] / weight[chosen]).astype(np.float32)
    return Scored(begun.first + chosen, begun.sizes[chosen], score), rows_done


class ScoreFiles:
    """The score files of a corpus, in a folder that all processes share.

    Args:
      config: the flags.
      network: what scores.
      parts: the corpus.

    Raises:
      UserError: if the folder cannot be written, or holds scores made with other settings.
    """

    def __init__(self, config: Config, network: Network, parts: list[Part]):
        self.settings = score_settings(config, network, parts)
        self._folder = config.scores_dir
        self._parts = parts
        self._keys: dict[int, str] = {}
        self._flag = "--output" if config.scores is None else "--scores"
        tables.make_folder(self._folder, self._flag)
        tables.check_settings(self._folder, self.settings, self._flag)

    def file(self, part: Part) -> Path:
        """Where the scores of a part are, or will be."""
        return self._folder / f"{part.stem}.parquet"

    def key(self, part: Part) -> str:
        """What the scores of a part come from, as a digest: what `fingerprint` sees, the network and the settings."""
        if part.number not in self._keys:
            settings = json.dumps(self.settings, sort_keys=True)
            self._keys[part.number] = digest([settings, part.number, fingerprint(part)])
        return self._keys[part.number]

    def identity(self, part: Part) -> str:
        """The text that a part's scores come from, as whoever scored it noted it, with the network and the settings."""
        noted = tables.metadata_of(self.file(part)) or {}
        return digest([self.key(part), noted.get("content", "")])

    def found(self, part: Part, exact: bool = True) -> bool | None:
        """Whether the scores of a part are there; None if those that are there come from another text.

        Args:
          part: of the corpus.
          exact: whether files with other times than those that were scored are read, to see whether they are the same. False
            goes by their `fingerprint`: for the parts of other shards, which may lie on a machine of their own.
        """
        metadata = tables.metadata_of(self.file(part))
        if metadata is None:
            return False
        same = metadata.get("key") == self.key(part)
        if same and exact and metadata.get("times") != times(part):
            same = metadata.get("content") == content(part)
        return same or None

    def score(self, part: Part, network: Network, batch_size: int, progress: Progress) -> None:
        """Scores a part and writes its file, in one piece.

        Raises:
          UserError: if the part's text cannot be read, the network gives no number, the file cannot be written, or another
            process has begun to score with other settings.
        """
        noted = {"key": self.key(part), "times": times(part), "content": content(part)}
        with tables.writing(self.file(part), SCHEMA, noted) as writer:
            held: list[Scored] = []
            began, scored_rows = time.monotonic(), 0
            for scored, rows in score_documents(network, documents_of(part), batch_size):
                _check_finite(scored, part)
                held.append(scored)
                scored_rows += rows
                progress.advance(len(scored.document))
                progress.show({"rows/s": scored_rows / max(time.monotonic() - began, 1e-9)})
                if sum(len(x.document) for x in held) >= GROUP_ROWS:
                    writer.write_table(_table(held))
                    held = []
            if held:
                writer.write_table(_table(held))
            tables.write_settings(self._folder, self.settings, self._flag)  # now that there is something made with them

    def read(self, part: Part) -> Iterator[Scored]:
        """Streams the scores of a part."""
        for batch in tables.read_batches(self.file(part), SCHEMA.names):
            yield Scored(*(column.to_numpy() for column in batch.columns))

    def missing(self, seconds: float) -> list[Part]:
        """The parts without scores, after waiting for them for at most `seconds`."""
        stop = time.monotonic() + seconds
        missing = [part for part in self._parts if not self.found(part, exact=False)]
        while missing and time.monotonic() < stop:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            missing = [part for part in missing if not self.found(part, exact=False)]
        return missing


def score_settings(config: Config, network: Network, parts: list[Part]) -> dict[str, Any]:
    """What decides the scores, the text in the files excepted."""
    names = [Path(name).name for part in parts for name in part.files or (part.name,)]
    return {
        "version": FORMAT_VERSION,
        "network": network.settings,
        "field": config.field,
        "documents": config.documents,
        "files": {"count": len(names), "names": digest(names)},
    }


def _check_finite(scored: Scored, part: Part) -> None:
    bad = np.flatnonzero(~np.isfinite(scored.score))
    if len(bad):
        raise UserError(
            f"The weighting network gives {scored.score[bad[0]]} for document {scored.document[bad[0]]} of {part.name}: "
            "give the weights of a run that did not diverge."
        )


def _table(held: list[Scored]) -> pa.Table:
    return pa.table([np.concatenate(column) for column in zip(*held, strict=True)], schema=SCHEMA)
