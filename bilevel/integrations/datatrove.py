"""Steps for pipelines of datatrove: score documents, choose among those of all tasks, and keep the chosen ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bilevel.data.text.rows import document_blocks
from bilevel.files import appearing, remove_abandoned
from bilevel.integrations.scorer import DocumentScorer as DocumentScorer
from bilevel.offline.choice import KEEP, Choice, Rule, choose
from bilevel.offline.documents import digests
from bilevel.tools.select.scores import schema_of
from bilevel.types import UserError

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError('bilevel.integrations.datatrove needs datatrove: pip install "bilevel[datatrove]".') from error

_COUNT = b"documents"
"""In the metadata of a table of scores: how many documents the task had, blank ones counted."""
_BLOCK = 1 << 24
_TYPE = "bilevel"


class ScoreDocuments(PipelineStep):
    """Give each document a score, and write those of a task to SCORES/NNNNN.parquet when its last document has passed.

    The tables are those of `bilevel select`: `document` (its number in the task, from 0), `bytes`, `score`, `text` (a number,
    equal for equal texts); with a group, also `group`. Blank documents pass without a score.

    Args:
        scorer: list of n texts -> float32 `[n]`, NaN for blank ones: a `DocumentScorer`, or your own.
        scores: a folder that all tasks see.
        field: name of the score in the metadata of a document.
        group: the name in the metadata of what groups documents, such as their site, for `max_per_group`.

    Raises:
        UserError: in its task, that the scorer gives another number of scores, or that a document has no group.
    """

    type, name = _TYPE, "score documents"

    def __init__(
        self, scorer: Callable[[Sequence[str]], NDArray[np.float32]], scores: str | Path, *, field: str = "score",
        group: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.scorer, self.scores, self.field, self.group = scorer, _folder(scores), field, group

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Score the documents of a task, about 16 MiB of text at once."""
        self.scores.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.scores)
        with _table(_file(self.scores, rank), schema_of(self.group is not None)) as writer:
            count = 0
            for block in document_blocks(data or (), _BLOCK):
                with self.track_time("block"):
                    scores = np.asarray(self.scorer([document.text for document in block]), np.float32)
                if scores.shape != (len(block),):
                    raise UserError(
                        f"The scorer gives {scores.shape} numbers for {len(block)} texts: let it give one for each."
                    )
                place = np.flatnonzero(~np.isnan(scores))
                sizes = np.array([len(_bytes(block[i])) for i in place], np.int64)
                texts = digests([_bytes(block[i]) for i in place])
                groups = [] if self.group is None else [digests([self._group(block[i]) for i in place])]
                writer.write_table(
                    pa.table([count + place, sizes, scores[place], texts, *groups], schema=writer.schema)
                )
                for i in place:
                    _note(block[i], self.field, float(scores[i]))
                self.stat_update("scored", value=len(place))
                count += len(block)
                yield from block
            writer.add_key_value_metadata({_COUNT: str(count)})

    def _group(self, document: Document) -> bytes:
        assert self.group is not None
        if document.metadata.get(self.group) is None:
            raise UserError(
                f"Document {document.id} has no {self.group!r} in its metadata: name another group, or omit it."
            )
        return str(document.metadata[self.group]).encode("utf-8", "surrogatepass")


class ChooseDocuments(PipelineStep):
    """Find, in one task, which of the scored documents of all tasks are kept: exactly, and as `bilevel select` does.

    With one file for each task the documents are those that `bilevel select` keeps; the noise of `rule="gumbel"` depends on the
    seed, the task and the position of a document in it.

    Args:
        scores: the folder that `ScoreDocuments` wrote to.
        choice: a folder for what is found.
        tasks: how many tasks scored.
        keep_fraction: share of the documents to keep. Give this, `keep_count` or `keep_quantile`.
        keep_count: number of documents to keep.
        keep_quantile: keep the documents whose quantile, the share of the documents with a lower score, is at least this.
        max_copies: most documents of the same text that are kept, the first ones of the tasks in turn (default: all).
        max_per_group: most documents of the same group that are kept, those of the highest ranks (default: all).
        rule: "top" for the highest scores, "gumbel" for a draw in proportion to exp(score / temperature).
        temperature: with "gumbel": higher is closer to uniform.
        seed: with "gumbel": decides the draw.

    Raises:
        UserError: not exactly one of the three is given, or one out of range; later, scores of a task are missing.
    """

    type, name = _TYPE, "choose documents"

    def __init__(
        self,
        scores: str | Path,
        choice: str | Path,
        *,
        tasks: int,
        keep_fraction: float | None = None,
        keep_count: int | None = None,
        keep_quantile: float | None = None,
        max_copies: int | None = None,
        max_per_group: int | None = None,
        rule: Literal["top", "gumbel"] = "top",
        temperature: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.scores, self.choice, self.tasks = _folder(scores), _folder(choice), tasks
        self.rule = Rule(keep_fraction, keep_count, keep_quantile, max_copies, max_per_group, rule, temperature, seed)
        given = [name for name in KEEP if getattr(self.rule, name) is not None]
        if len(given) != 1:
            raise UserError(f"Found {' and '.join(given) or 'none'}: give exactly one of {', '.join(KEEP)}.")

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the choice; a document that is given passes."""
        if world_size != 1:
            raise UserError(f"ChooseDocuments sees the scores of all tasks, so it runs with tasks=1, not {world_size}.")
        tables = [_read(self.scores, task) for task in range(self.tasks)]
        if self.rule.max_per_group is not None and any("group" not in table.schema.names for table in tables):
            raise UserError(
                f"{self.scores} has scores without groups: give ScoreDocuments a group, or omit max_per_group."
            )
        names = ("score", "text") if self.rule.max_per_group is None else ("score", "text", "group")
        found, *kinds = ([table[name].to_numpy() for table in tables] for name in names)
        self.choice.mkdir(parents=True, exist_ok=True)
        choice = choose(found, self.rule, str(self.scores), str, *kinds)
        choice.save(self.choice)
        self.stat_update("documents", value=sum(choice.documents))
        self.stat_update("kept", value=sum(choice.kept))
        yield from data or ()


class KeepDocuments(PipelineStep):
    """Let those documents pass that `ChooseDocuments` chose, with their scores.

    The documents must come as they were scored: the same ones, in the same order, in the same tasks.

    Args:
        scores: the folder that `ScoreDocuments` wrote to.
        choice: the folder that `ChooseDocuments` wrote to.
        field: name of the score in the metadata of a document.

    Raises:
        UserError: in its task, that the documents are not those that were scored.
    """

    type, name = _TYPE, "keep documents"

    def __init__(self, scores: str | Path, choice: str | Path, *, field: str = "score"):
        super().__init__()
        self.scores, self.choice, self.field = _folder(scores), _folder(choice), field

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Keep documents by their positions in the task."""
        choice, table = Choice.load(self.choice), _read(self.scores, rank)
        numbers, sizes, scores = (table[name].to_numpy() for name in ("document", "bytes", "score"))
        if world_size != len(choice.documents) or len(scores) != choice.documents[rank]:
            raise UserError(
                f"{self.choice} is a choice of the documents of {len(choice.documents)} tasks, {sum(choice.documents)} in all, "
                f"and task {rank} of {world_size} has {len(scores)}: score, choose and keep with the same tasks."
            )
        count = int(table.schema.metadata[_COUNT])
        place = np.full(count, -1)
        place[numbers] = np.arange(len(numbers))
        kept, seen = choice.kept_of(scores, rank), 0
        for seen, document in enumerate(data or (), start=1):
            i = place[seen - 1] if seen <= count else -1
            if seen > count or (i >= 0 and len(_bytes(document)) != sizes[i]):
                break
            if i >= 0 and kept[i]:
                _note(document, self.field, float(scores[i]))
                self.stat_update("kept")
                yield document
        else:
            if seen == count:
                return
        raise UserError(
            f"The documents of task {rank} are not the {count} that were scored in {_file(self.scores, rank)} (they differ at "
            f"number {seen}, or in how many there are): read them in the same order, or score again."
        )


def _folder(given: str | Path) -> Path:
    if "://" in str(given):
        raise UserError(f"{given} is a URL: give a folder of a file system that all tasks see.")
    return Path(given).absolute()


def _note(document: Document, field: str, score: float) -> None:
    if document.metadata.setdefault(field, score) != score:
        raise UserError(
            f"Document {document.id} has another {field!r} in its metadata: give the score another name (field=…)."
        )


def _bytes(document: Document) -> bytes:
    return document.text.encode("utf-8", "surrogatepass")


def _file(folder: Path, task: int) -> Path:
    return folder / f"{task:05d}.parquet"


@contextlib.contextmanager
def _table(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a table of scores in one piece; if something is raised, or the task is killed, there is none."""
    with appearing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield writer


def _read(folder: Path, task: int) -> pa.Table:
    file = _file(folder, task)
    try:
        found = pq.read_table(file)
        return found.replace_schema_metadata(pq.read_metadata(file).metadata)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The scores of task {task} are missing or damaged ({error}): run ScoreDocuments for it."
        ) from error
