"""The first phase: a table of scores for each part of the corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import Document, digest, document_blocks, read_ahead
from bilevel.study.task import DocumentRows, Pack
from bilevel.tools.select import tables
from bilevel.tools.select.config import Config
from bilevel.tools.select.corpus import Part, content, state, stream
from bilevel.tools.select.network import Network
from bilevel.training.progress import Progress
from bilevel.types import UserError

FORMAT_VERSION = 1
SCHEMA = pa.schema([("document", pa.int64()), ("bytes", pa.int64()), ("score", pa.float32())])
_BLOCK_BYTES = 1 << 24
_IN_FLIGHT = 32  # batches: one huge document must not have all its rows on the device
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
    """Score documents as a stream: each by the mean logit of its rows, weighted by their bytes.

    Args:
      network: what scores rows.
      documents: blank ones (`b""`) get no score.
      batch_size: rows in one program call; the last one of about 16 MiB of text is padded.

    Yields:
      The scores of some documents, and the number of their rows. While the device works on them, a thread cuts the next.
    """
    first = 0
    with read_ahead(enumerate(_cut(network.pack, documents, batch_size))) as blocks:
        for _, (sizes, batches) in blocks:
            if batches:
                owner = np.concatenate([rows.owner for rows in batches])
                size = np.concatenate([rows.size for rows in batches])
                weight = np.bincount(owner, size, len(sizes))
                total = np.bincount(owner, size * _logits(network, batches), len(sizes))
                chosen = np.flatnonzero(weight)
                score = (total[chosen] / weight[chosen]).astype(np.float32)
                yield Scored(first + chosen, sizes[chosen], score), len(owner)
            first += len(sizes)


def _logits(network: Network, batches: list[DocumentRows]) -> NDArray[np.float64]:
    found = []
    for start in range(0, len(batches), _IN_FLIGHT):
        some = batches[start : start + _IN_FLIGHT]
        begun = [network.logits(rows.batch) for rows in some]
        found += [np.asarray(x, np.float64)[: len(rows.owner)] for x, rows in zip(begun, some, strict=True)]
    return np.concatenate(found)


def _cut(
    pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[DocumentRows]]]:
    """Stream the sizes of some documents, and their rows in batches of one size."""

    def padded(rows: DocumentRows) -> DocumentRows:
        missing = batch_size - len(rows.owner)
        batch = {k: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge") for k, x in rows.batch.items()}
        return rows._replace(batch=batch) if missing else rows

    for block in document_blocks(documents, _BLOCK_BYTES):
        texts = [document.text for document in block]
        yield np.fromiter(map(len, texts), np.int64, len(texts)), list(map(padded, pack(texts, batch_size)))


class ScoreFiles:
    """The score files of a corpus, in a folder that all processes share."""

    def __init__(self, config: Config, network: Network, parts: list[Part]):
        names = [Path(name).name for part in parts for name in part.files or (part.source.name,)]
        self.settings: dict[str, Any] = {
            "version": FORMAT_VERSION, "network": network.settings, "field": config.field, "documents": config.documents,
            "files": {"count": len(names), "names": digest(names)},
        }  # fmt: skip
        self._folder, self._parts = config.scores or config.output / "scores", parts
        self._flag = "--output" if config.scores is None else "--scores"
        tables.make_folder(self._folder, self._flag)
        tables.check_settings(self._folder, self.settings, self._flag)

    def file(self, part: Part) -> Path:
        """Where the scores of a part are, or will be."""
        return self._folder / f"{part.stem}.parquet"

    def content(self, part: Part) -> str:
        """The text that a part's scores come from, as whoever scored it noted it."""
        return (tables.metadata_of(self.file(part)) or {}).get("content", "")

    def found(self, part: Part, exact: bool = True) -> bool | None:
        """Whether the scores of a part are there; None if those that are there come from another text.

        Args:
          part: of the corpus.
          exact: whether files with other times than those that were scored are read, to see whether they are the same. False
            goes by their sizes: for the parts of other shards, which may lie on a machine of their own.
        """
        noted = tables.metadata_of(self.file(part))
        if noted is None:
            return False
        before, now = noted["state"], state(part)
        if before == now:
            return True
        same = [size for size, _ in before] == [size for size, _ in now]
        return (same and (not exact or noted["content"] == content(part))) or None

    def score(self, part: Part, network: Network, batch_size: int, progress: Progress) -> None:
        """Score a part and write its file, in one piece.

        Raises:
          UserError: if the network gives no number, or another process has begun to score with other settings.
        """
        noted = {"state": state(part), "content": content(part)}
        began, rows_done = time.monotonic(), 0
        with tables.writing(self.file(part), SCHEMA, noted) as writer:
            for scored, rows in score_documents(network, stream(part, part.source.read), batch_size):
                if not np.isfinite(scored.score).all():
                    bad = np.flatnonzero(~np.isfinite(scored.score))[0]
                    raise UserError(
                        f"The weighting network gives {scored.score[bad]} for document {scored.document[bad]} of {part.source.name}: "
                        "give the weights of a run that did not diverge."
                    )
                writer.write_table(pa.table(list(scored), schema=SCHEMA))
                rows_done += rows
                progress.advance(len(scored.document))
                progress.show({"rows/s": rows_done / max(time.monotonic() - began, 1e-9)})
            # Now that there is something made with them.
            tables.check_settings(self._folder, self.settings, self._flag, write=True)

    def read(self, part: Part) -> Iterator[Scored]:
        """Stream the scores of a part."""
        for batch in tables.read_batches(self.file(part), SCHEMA.names):
            yield Scored(*(column.to_numpy() for column in batch.columns))

    def missing(self, seconds: float) -> list[Part]:
        """Return the parts without scores, after waiting for them for at most `seconds`."""
        stop, missing = time.monotonic() + seconds, self._parts
        while missing := [part for part in missing if not self.found(part, exact=False)]:
            if time.monotonic() >= stop:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return missing
