"""The second phase: the table of all documents, or the kept documents themselves, for each part of the corpus."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.training.progress import Progress
from bilevel.training.run_dir import write_atomically
from experiments.select import tables
from experiments.select.choice import Choice, kept_mask, value_of
from experiments.select.config import Config
from experiments.select.corpus import Part, documents_of, lines_of
from experiments.select.scores import Scored, ScoreFiles

SELECTED = "selected"
WRITTEN = "written"
SCHEMA = pa.schema(
    [
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("document", pa.int64()),
        ("bytes", pa.int64()),
        ("score", pa.float32()),
        ("kept", pa.bool_()),
    ]
)


class Selection:
    """Writes what is kept, part by part; a note beside each file says which choice it was written for.

    Args:
      config: the flags.
      files: all scores.
      parts: the corpus.
      choice: what is kept.

    Raises:
      UserError: if the output cannot be written.
    """

    def __init__(self, config: Config, files: ScoreFiles, parts: list[Part], choice: Choice):
        self._config, self._files, self._parts, self._choice = config, files, parts, choice
        settings = json.dumps(config.choice_settings(), sort_keys=True)
        self._identity = digest([settings, *(files.identity(part) for part in parts)])
        for name in (SELECTED, WRITTEN):
            tables.make_folder(config.output / name, "--output")

    def target(self, part: Part) -> Path:
        """The file that is written for a part."""
        if self._config.format == "parquet":
            suffix = ".parquet"
        elif part.source.lines is None:
            suffix = ".jsonl.gz"
        else:
            suffix = "" if part.stem.lower().endswith(".gz") else ".gz"
        return self._config.output / SELECTED / f"{part.stem}{suffix}"

    def is_written(self, part: Part) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        try:
            noted = json.loads(self._note(part).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return noted == self._noted() and self.target(part).exists()

    def write(self, part: Part, progress: Progress) -> None:
        """Writes the file of a part, in one piece.

        Raises:
          UserError: if it cannot be written, or the part's text cannot be read.
        """
        mask = kept_mask(self._choice, part, self._config)
        scored = ((batch, mask(batch)) for batch in self._files.read(part))
        if self._config.format == "parquet":
            _write_table(self.target(part), part, scored, progress)
        else:
            _write_documents(self.target(part), part, scored, progress)
        write_atomically(self._note(part), json.dumps(self._noted()) + "\n")

    def write_summary(self) -> None:
        """Writes summary.json; the same for every process, but for the paths where each has a copy of the corpus."""
        files = [
            {
                "file": part.name if not part.files else list(part.files),
                "documents": found.documents,
                "kept": found.kept,
                "output": self.target(part).name,
            }
            for part, found in zip(self._parts, self._choice.parts, strict=True)
        ]
        threshold = value_of(self._choice.threshold)
        summary = {
            "documents": self._choice.documents,
            "kept": self._choice.kept,
            "threshold": threshold,
            "files": files,
        }
        write_atomically(self._config.output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _note(self, part: Part) -> Path:
        return self._config.output / WRITTEN / f"{part.stem}.json"

    def _noted(self) -> dict[str, Any]:
        return {"choice": self._identity}


_Marked = Iterator[tuple[Scored, NDArray[np.bool_]]]


def _write_table(target: Path, part: Part, scored: _Marked, progress: Progress) -> None:
    with tables.writing(target, SCHEMA, {}) as writer:
        for batch, kept in scored:
            if part.files:
                which, number = batch.document.astype(np.int32), np.zeros_like(batch.document)
            else:
                which, number = np.zeros(len(kept), np.int32), batch.document
            file = pa.DictionaryArray.from_arrays(pa.array(which), pa.array(part.files or (part.name,)))
            writer.write_table(pa.table([file, number, batch.size, batch.score, kept], schema=SCHEMA))
            progress.advance(len(kept))


def _write_documents(target: Path, part: Part, scored: _Marked, progress: Progress) -> None:
    kept = _KeptNumbers(batch.document[mask] for batch, mask in scored)
    with (
        tables.appearing(target) as temporary,
        temporary.open("wb") as raw,
        # No name and no time in the header: the same documents give the same bytes.
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as out,
    ):
        for piece in _kept_lines(part, kept) if part.source.lines else _kept_records(part, kept):
            out.write(piece.text)
            progress.advance(piece.documents)


class _Piece(NamedTuple):
    text: bytes
    documents: int


class _KeptNumbers:
    """Numbers of kept documents, ascending, taken from a stream as the documents go by."""

    def __init__(self, stream: Iterator[NDArray[np.int64]]):
        self._stream = stream
        self._held = np.zeros(0, np.int64)

    def below(self, stop: int) -> list[int]:
        """Those not taken yet that are below `stop`."""
        taken: list[int] = []
        while True:
            count = int(np.searchsorted(self._held, stop))
            taken += self._held[:count].tolist()
            self._held = self._held[count:]
            if len(self._held):
                return taken
            following = next(self._stream, None)
            if following is None:
                return taken
            self._held = following


def _kept_lines(part: Part, kept: _KeptNumbers) -> Iterator[_Piece]:
    before = 0
    for block in lines_of(part):
        chosen = [block[number - before] for number in kept.below(before + len(block))]
        before += len(block)
        if chosen and not chosen[-1].endswith(b"\n"):
            chosen[-1] += b"\n"  # the end of the file
        yield _Piece(b"".join(chosen), len(chosen))


def _kept_records(part: Part, kept: _KeptNumbers) -> Iterator[_Piece]:
    for number, document in enumerate(documents_of(part)):
        if kept.below(number + 1):
            where = {"file": part.files[number]} if part.files else {"document": number}
            record = where | {"text": document.text.decode("utf-8")}
            yield _Piece(json.dumps(record, ensure_ascii=False).encode() + b"\n", 1)
