"""The second phase: which documents are kept, and the table of all, or the kept ones themselves, for each part."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import chain, compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.data.text.parts import Part
from bilevel.files import appearing, remove_abandoned
from bilevel.offline.documents import drawn_ranks, highest_documents
from bilevel.tools.select.config import Config
from bilevel.tools.select.scores import PATIENCE, ScoreFiles
from bilevel.training import prepare_run_dir
from bilevel.training.progress import Progress
from bilevel.training.run_dir import read_json, write_json
from bilevel.types import UserError

SELECTED = "selected"
DECIDES = ("format", "keep_fraction", "keep_count", "rule", "temperature", "seed")
"""Flags that say, given the scores, what is written."""
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the scores of the corpus: the scale of scores is that of one network, and only their order compares to another's."""
SCHEMA = pa.schema(
    [("file", pa.dictionary(pa.int32(), pa.string())), ("document", pa.int64()), ("bytes", pa.int64()),
     ("score", pa.float32()), ("kept", pa.bool_())]
)  # fmt: skip


def choose(config: Config, scores: Sequence[NDArray[np.float32]]) -> tuple[float, list[NDArray[np.bool_]]]:
    """Find the documents to keep, exactly as many as the flags ask for; see `highest_documents`.

    Every process finds the same ones, given the scores by part, which are in memory for the whole corpus.

    Raises:
      UserError: if the corpus has no text, or fewer documents than are to be kept.
    """
    whole = sum(map(len, scores))
    if not whole:
        raise UserError(f"{config.corpus} holds no text: give files with text in them.")
    count = config.keep_count or max(1, round((config.keep_fraction or 0) * whole))
    if count > whole:
        raise UserError(
            f"--keep-count {count} is more than the {whole} documents in {config.corpus}: give at most {whole} (what "
            "is scored is used again)."
        )
    if config.rule == "gumbel":
        scores = [drawn_ranks(own, config.temperature, (config.seed, part)) for part, own in enumerate(scores)]
    return highest_documents(scores, count)


class Selection:
    """Writes what is kept, part by part; a note beside each file says which choice it was written for."""

    def __init__(self, config: Config, files: ScoreFiles, parts: list[Part]):
        self._config, self._files, self._parts = config, files, parts
        scores = [files.read(part)["score"].to_numpy() for part in parts]
        self._threshold, self._kept = choose(config, scores)
        values = np.quantile(np.concatenate(scores), QUANTILES)
        self._quantiles = {str(q): float(value) for q, value in zip(QUANTILES, values, strict=True)}
        choice = {name: getattr(config, name) for name in DECIDES}
        prepare_run_dir(config.output, {"scores": files.settings, "choice": choice}, flag="--output", patience=PATIENCE)
        self._folder = config.output / SELECTED
        self._folder.mkdir(exist_ok=True)
        remove_abandoned(self._folder)

    def target(self, part: Part) -> Path:
        """The file that is written for a part."""
        as_lines = "" if part.stem.lower().endswith(".gz") else ".gz"
        suffix = ".jsonl.gz" if part.source.lines is None else as_lines
        return self._folder / f"{part.stem}{'.parquet' if self._config.format == 'parquet' else suffix}"

    def is_written(self, part: Part) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        note = self._note(part)
        return note.exists() and self.target(part).exists() and read_json(note) == self._choice(part)

    def write(self, part: Part, progress: Progress) -> None:
        """Write the file of a part, in one piece."""
        with appearing(self.target(part)) as file:
            if self._config.format == "parquet":
                pq.write_table(self._table(part), file, compression="zstd")
            else:
                # No name and no time in the header: the same documents give the same bytes.
                with file.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as out:
                    for line in self._lines(part):
                        out.write(line)
                        progress.advance()
        write_json(self._note(part), self._choice(part))

    def write_summary(self) -> tuple[int, int]:
        """Write summary.json, the same for every process but for the paths of copies; returns how many of how many are kept."""
        files = [
            {"file": list(part.files) or part.source.name, "documents": len(kept), "kept": int(kept.sum()),
             "output": self.target(part).name}
            for part, kept in zip(self._parts, self._kept, strict=True)
        ]  # fmt: skip
        kept, documents = (sum(file[name] for file in files) for name in ("kept", "documents"))
        summary = {
            "documents": documents, "kept": kept, "threshold": self._threshold, "score_quantiles": self._quantiles,
            "files": files,
        }  # fmt: skip
        write_json(self._config.output / "summary.json", summary)
        return kept, documents

    def _note(self, part: Part) -> Path:
        return self._config.output / "written" / f"{part.stem}.json"

    def _choice(self, part: Part) -> dict[str, str]:
        scored = self._files.noted(part) or {}
        return {"choice": digest([scored.get("content", ""), self._kept[part.number].tobytes()])}

    def _table(self, part: Part) -> pa.Table:
        """Every document that is not blank."""
        number, size, score = self._files.read(part).columns
        which = np.zeros(len(number), np.int32)
        if part.files:
            which, number = number.to_numpy().astype(np.int32), which.astype(np.int64)
        file = pa.DictionaryArray.from_arrays(which, part.files or (part.source.name,))
        return pa.table([file, number, size, score, self._kept[part.number]], schema=SCHEMA)

    def _lines(self, part: Part) -> Iterator[bytes]:
        """Stream the kept documents: the original lines, or JSON lines where documents are not lines."""
        numbers = self._files.read(part)["document"].to_numpy()[self._kept[part.number]]
        kept = np.bincount(numbers)  # by the number of the document, up to the last one
        if part.source.lines is not None:
            for line in compress(chain.from_iterable(part.stream(part.source.lines)), kept):
                yield line.removesuffix(b"\n") + b"\n"  # the last one of a file may have no end
        else:
            for number, document in compress(enumerate(part.stream(part.source.read)), kept):
                where = {"file": part.files[number]} if part.files else {"document": number}
                yield json.dumps({**where, "text": document.text.decode()}, ensure_ascii=False).encode() + b"\n"
