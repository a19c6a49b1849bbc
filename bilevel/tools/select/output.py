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
from bilevel.tools.select import tables
from bilevel.tools.select.choice import Choice, Marked, marked, value_of
from bilevel.tools.select.config import Config
from bilevel.tools.select.corpus import Part, stream
from bilevel.tools.select.scores import ScoreFiles
from bilevel.training.progress import Progress
from bilevel.training.run_dir import write_atomically

SELECTED = "selected"
WRITTEN = "written"
SCHEMA = pa.schema(
    [("file", pa.dictionary(pa.int32(), pa.string())), ("document", pa.int64()), ("bytes", pa.int64()),
     ("score", pa.float32()), ("kept", pa.bool_())]
)  # fmt: skip


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
        settings = json.dumps([files.settings, config.choice_settings()], sort_keys=True)
        self._noted = {"choice": digest([settings, *(files.content(part) for part in parts)])}
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
        return noted == self._noted and self.target(part).exists()

    def write(self, part: Part, progress: Progress) -> None:
        """Write the file of a part, in one piece.

        Raises:
          UserError: if it cannot be written, or the part's text cannot be read.
        """
        write = _write_table if self._config.format == "parquet" else _write_documents
        write(self.target(part), part, marked(self._choice, self._config, self._files, part), progress)
        write_atomically(self._note(part), json.dumps(self._noted) + "\n")

    def write_summary(self) -> None:
        """Write summary.json; the same for every process, but for the paths where each has a copy of the corpus."""
        choice, names = self._choice, [list(part.files) or part.name for part in self._parts]
        outputs = [self.target(part).name for part in self._parts]
        files = [
            {"file": name, "documents": documents, "kept": kept, "output": output}
            for name, documents, kept, output in zip(names, choice.documents, choice.kept, outputs, strict=True)
        ]
        counts = {"documents": sum(choice.documents), "kept": sum(choice.kept), "threshold": value_of(choice.threshold)}
        text = json.dumps({**counts, "files": files}, indent=2, ensure_ascii=False)
        write_atomically(self._config.output / "summary.json", text + "\n")

    def _note(self, part: Part) -> Path:
        return self._config.output / WRITTEN / f"{part.stem}.json"


def _write_table(target: Path, part: Part, scored: Iterator[Marked], progress: Progress) -> None:
    with tables.writing(target, SCHEMA, {}) as writer:
        for batch, kept in scored:
            if part.files:
                which, number = batch.document.astype(np.int32), np.zeros_like(batch.document)
            else:
                which, number = np.zeros(len(kept), np.int32), batch.document
            file = pa.DictionaryArray.from_arrays(pa.array(which), pa.array(part.files or (part.name,)))
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
        for text, count in (_kept_lines if part.source.lines else _kept_records)(part, kept):
            out.write(text)
            progress.advance(count)


def _kept_lines(part: Part, kept: NDArray[np.int64]) -> Iterator[tuple[bytes, int]]:
    """Stream kept lines, some in a piece, and their number."""
    assert part.source.lines is not None
    before = 0
    for block in stream(part, part.source.lines):
        first, stop = np.searchsorted(kept, (before, before + len(block)))
        chosen = [block[number - before] for number in kept[first:stop].tolist()]
        before += len(block)
        if chosen and not chosen[-1].endswith(b"\n"):
            chosen[-1] += b"\n"  # the end of the file
        yield b"".join(chosen), len(chosen)


def _kept_records(part: Part, kept: NDArray[np.int64]) -> Iterator[tuple[bytes, int]]:
    """Stream kept documents as JSON lines."""
    left = iter(kept)
    following = next(left, None)
    for number, document in enumerate(stream(part, part.source.read)):
        if number == following:
            following = next(left, None)
            where = {"file": part.files[number]} if part.files else {"document": number}
            record = where | {"text": document.text.decode("utf-8")}
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n", 1
