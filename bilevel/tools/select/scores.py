"""The first phase: the corpus in parts, and a table of scores for each of them."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bilevel.data import Document, Source, digest, document_blocks, open_source, read_ahead
from bilevel.data.opening import open_bytes, size_of, stamp_of
from bilevel.data.text.files import source_of_files
from bilevel.study.task import DocumentRows, Pack
from bilevel.tools.select import tables
from bilevel.tools.select.config import Config
from bilevel.tools.select.network import Network
from bilevel.training.progress import Progress
from bilevel.types import UserError

FILES_IN_PART = 256
"""Where whole files are documents, this many make up a part."""
READ_ROWS = 1 << 17
SCHEMA = pa.schema([("document", pa.int64()), ("bytes", pa.int64()), ("score", pa.float32())])
_BLOCK_BYTES = 1 << 24
T = TypeVar("T")


class Part(NamedTuple):
    """A file of the corpus; or a run of files that are a document each; or a source that is not made of files."""

    number: int
    """Position in the corpus."""
    source: Source
    """Its documents."""
    files: tuple[str, ...] = ()
    """The file of each document, where files are documents; else empty."""

    @property
    def stem(self) -> str:
        """Beginning of the names of the files written for this part."""
        return f"{self.number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(self.source.name).name)[-100:]}"


def open_parts(config: Config) -> list[Part]:
    """Return the parts of the corpus in order; the same for all processes.

    Raises:
      UserError: for data that are missing or of the wrong kind.
    """
    whole = open_source(config.corpus, field=config.field, documents=config.documents, blank_files=True)
    if not whole.paths:
        return [Part(0, whole)]
    size = 1 if config.documents == "line" else FILES_IN_PART
    parts = []
    for i, start in enumerate(range(0, len(whole.paths), size)):
        paths = list(whole.paths[start : start + size])
        files = tuple(map(str, paths)) if config.documents == "file" else ()
        name = "files" if files else str(paths[0])
        parts.append(Part(i, source_of_files(name, paths, config.field, config.documents, blank_files=True), files))
    return parts


def state(part: Part) -> list[list[Any]]:
    """Return size and time of each file of a part: while they stay, its text has stayed.

    Raises:
      UserError: if a file is gone.
    """
    with _reading(part):
        found = [[size_of(path), stamp_of(path)] for path in part.source.paths]
        return found or [[part.source.fingerprint(), None]]


def content(part: Part) -> str:
    """Return a digest of all bytes of a part (of what is not made of files, its `state`); errors as `state`."""
    with _reading(part):
        hashes = []
        for path in part.source.paths:
            with open_bytes(path, decompress=False) as file:
                hashes.append(hashlib.file_digest(file, "blake2b").digest())
        return digest(hashes or [str(state(part))])


def stream(part: Part, read: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Stream `part.source.read` or `part.source.lines`; errors as `state`."""
    with _reading(part):
        yield from read()


@contextlib.contextmanager
def _reading(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot read {part.source.name} ({error.strerror or error}): put it back, or select from other files."
        ) from error


class Scored(NamedTuple):
    """Scores of some documents, in the order of the corpus."""

    document: NDArray[np.int64]
    """int64 `[n]`: numbers in the part, blank documents counted."""
    size: NDArray[np.int64]
    """int64 `[n]`: bytes of each document."""
    score: NDArray[np.float32]
    """float32 `[n]`."""


def score_documents(network: Network, documents: Iterable[Document], batch_size: int) -> Iterator[Scored]:
    """Score documents as a stream: each by the mean logit of its rows, weighted by their bytes.

    Blank ones (`b""`) get no score. `batch_size` rows are scored in one program call; the last one of about 16 MiB of text is
    padded. While the device works on some documents, a thread cuts the next.
    """
    first = 0
    with read_ahead(enumerate(_cut(network.pack, documents, batch_size))) as blocks:
        for _, (sizes, batches) in blocks:
            if batches:
                owner = np.concatenate([rows.owner for rows in batches])
                size = np.concatenate([rows.size for rows in batches])
                weight = np.bincount(owner, size, len(sizes))
                begun = [network.logits(rows.batch) for rows in batches]
                logits = [np.asarray(x)[: len(rows.owner)] for x, rows in zip(begun, batches, strict=True)]
                total = np.bincount(owner, size * np.concatenate(logits, dtype=np.float64), len(sizes))
                chosen = np.flatnonzero(weight)
                yield Scored(first + chosen, sizes[chosen], (total[chosen] / weight[chosen]).astype(np.float32))
            first += len(sizes)


def _cut(
    pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[DocumentRows]]]:
    """Stream the sizes of some documents, and their rows in batches of one size."""

    def padded(rows: DocumentRows) -> DocumentRows:
        missing = batch_size - len(rows.owner)
        if not missing:
            return rows
        batch = {k: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge") for k, x in rows.batch.items()}
        return rows._replace(batch=batch)

    for block in document_blocks(documents, _BLOCK_BYTES):
        texts = [document.text for document in block]
        yield np.fromiter(map(len, texts), np.int64, len(texts)), list(map(padded, pack(texts, batch_size)))


class ScoreFiles:
    """The score files of a corpus, in a folder that all processes share."""

    def __init__(self, config: Config, network: Network, parts: list[Part]):
        names = [Path(name).name for part in parts for name in part.files or (part.source.name,)]
        self.settings: dict[str, Any] = {
            "network": network.settings, "field": config.field, "documents": config.documents,
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

        If its files have other times than those that were scored, they are read to see whether they are the same. Without
        `exact`, sizes decide: for the parts of other shards, which may lie on a machine of their own.
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
        """Score a part and write its file, in one piece; a `UserError` says that the network gives no number."""
        noted = {"state": state(part), "content": content(part)}
        with tables.writing(self.file(part), SCHEMA, noted) as writer:
            for scored in score_documents(network, stream(part, part.source.read), batch_size):
                for bad in np.flatnonzero(~np.isfinite(scored.score))[:1]:
                    raise UserError(
                        f"The weighting network gives {scored.score[bad]} for document {scored.document[bad]} of "
                        f"{part.source.name}: give the weights of a run that did not diverge."
                    )
                writer.write_table(pa.table(list(scored), schema=SCHEMA))
                progress.advance(len(scored.document))
            # Now that there is something made with them.
            tables.check_settings(self._folder, self.settings, self._flag, write=True)

    def read(self, part: Part) -> Iterator[Scored]:
        """Stream the scores of a part, READ_ROWS at a time; a `UserError` says that their file is damaged."""
        file = self.file(part)
        try:
            with pq.ParquetFile(file) as stored:
                for batch in stored.iter_batches(READ_ROWS, columns=SCHEMA.names):
                    yield Scored(*(column.to_numpy() for column in batch.columns))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged ({error}): remove it, and give the same command again.") from error

    def missing(self, seconds: float) -> list[Part]:
        """Return the parts without scores, after waiting for them for at most `seconds`."""
        stop, missing = time.monotonic() + seconds, self._parts
        while missing := [part for part in missing if not self.found(part, exact=False)]:
            if time.monotonic() >= stop:
                break
            time.sleep(0.5)
        return missing
