"""The second phase: the table of all documents, or the kept documents themselves, for each part of the corpus."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.files import appearing
from bilevel.study.files import read_json, write_json
from bilevel.tools.select import tables
from bilevel.tools.select.choice import Choice, Marked, marked, value_of
from bilevel.tools.select.config import Config
from bilevel.tools.select.corpus import Part, stream
from bilevel.tools.select.scores import ScoreFiles
from bilevel.training.progress import Progress

SELECTED, WRITTEN = "selected", "written"
SCHEMA = pa.schema(
    [("file", pa.dictionary(pa.int32(), pa.string())), ("document", pa.int64()), ("bytes", pa.int64()),
     ("score", pa.float32()), ("kept", pa.bool_())]
)  # fmt: skip


class Selection:
    """Writes what is kept, part by part; a note beside each file says which choice it was written for."""

    def __init__(self, config: Config, files: ScoreFiles, parts: list[Part], choice: Choice):
        self._config, self._files, self._parts, self._choice = config, files, parts, choice
        settings = json.dumps([files.settings, config.choice_settings()], sort_keys=True)
        self._noted = {"choice": digest([settings, *(files.content(part) for part in parts)])}
        for name in (SELECTED, WRITTEN):
            tables.make_folder(config.output / name, "--output")

    def target(self, part: Part) -> Path:
        """The file that is written for a part."""
        suffix = ".jsonl.gz" if part.source.lines is None else "" if part.stem.lower().endswith(".gz") else ".gz"
        suffix = ".parquet" if self._config.format == "parquet" else suffix
        return self._config.output / SELECTED / f"{part.stem}{suffix}"

    def is_written(self, part: Part) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        note = self._note(part)
        return note.exists() and self.target(part).exists() and read_json(note) == self._noted

    def write(self, part: Part, progress: Progress) -> None:
        """Write the file of a part, in one piece."""
        write = _write_table if self._config.format == "parquet" else _write_documents
        write(self.target(part), part, marked(self._choice, self._config, self._files, part), progress)
        write_json(self._note(part), self._noted)

    def write_summary(self) -> None:
        """Write summary.json; the same for every process, but for the paths where each has a copy of the corpus."""
        c = self._choice
        files = [
            {"file": list(part.files) or part.source.name, "documents": documents, "kept": kept,
             "output": self.target(part).name}
            for part, documents, kept in zip(self._parts, c.documents, c.kept, strict=True)
        ]  # fmt: skip
        counts = {"documents": sum(c.documents), "kept": sum(c.kept), "threshold": value_of(c.threshold)}
        write_json(self._config.output / "summary.json", {**counts, "files": files})

    def _note(self, part: Part) -> Path:
        return self._config.output / WRITTEN / f"{part.stem}.json"


def _write_table(target: Path, part: Part, scored: Iterator[Marked], progress: Progress) -> None:
    with tables.writing(target, SCHEMA, {}) as writer:
        for batch, kept in scored:
            which, number = np.zeros_like(batch.document), batch.document
            if part.files:
                which, number = number, which
            names = pa.array(part.files or (part.source.name,))
            file = pa.DictionaryArray.from_arrays(pa.array(which.astype(np.int32)), names)
            writer.write_table(pa.table([file, number, batch.size, batch.score, kept], schema=SCHEMA))
            progress.advance(len(kept))


def _write_documents(target: Path, part: Part, scored: Iterator[Marked], progress: Progress) -> None:
    kept = np.concatenate([np.zeros(0, np.int64), *(batch.document[mask] for batch, mask in scored)])
    with (
        appearing(target) as temporary,
        temporary.open("wb") as raw,
        # No name and no time in the header: the same documents give the same bytes.
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as out,
    ):
        for lines in (_kept_lines if part.source.lines else _kept_records)(part, kept):
            out.write(b"".join(lines))
            progress.advance(len(lines))


def _kept_lines(part: Part, kept: NDArray[np.int64]) -> Iterator[list[bytes]]:
    """Stream lists of kept lines."""
    assert part.source.lines is not None
    before = 0
    for block in stream(part, part.source.lines):
        first, stop = np.searchsorted(kept, (before, before + len(block)))
        chosen = [block[number - before] for number in kept[first:stop].tolist()]
        before += len(block)
        yield [
            line if line.endswith(b"\n") else line + b"\n" for line in chosen
        ]  # the last one of a file may have none


def _kept_records(part: Part, kept: NDArray[np.int64]) -> Iterator[list[bytes]]:
    """Stream kept documents as JSON lines."""
    left = iter([*kept.tolist(), -1])
    following = next(left)
    for number, document in enumerate(stream(part, part.source.read)):
        if number == following:
            following = next(left)
            where = {"file": part.files[number]} if part.files else {"document": number}
            yield [json.dumps({**where, "text": document.text.decode()}, ensure_ascii=False).encode() + b"\n"]
