"""The second phase: which documents are kept, and the table of all, or the kept ones themselves, for each part."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.files import appearing
from bilevel.study.files import read_json, write_json
from bilevel.tools.select import tables
from bilevel.tools.select.config import Config
from bilevel.tools.select.scores import Part, Scored, ScoreFiles, stream
from bilevel.training.progress import Progress
from bilevel.types import UserError

SELECTED, WRITTEN = "selected", "written"
SCHEMA = pa.schema(
    [("file", pa.dictionary(pa.int32(), pa.string())), ("document", pa.int64()), ("bytes", pa.int64()),
     ("score", pa.float32()), ("kept", pa.bool_())]
)  # fmt: skip


class Choice(NamedTuple):
    """Which documents are kept."""

    threshold: float
    """Rank of the last document that is kept."""
    kept: list[NDArray[np.bool_]]
    """By part: of each document that is not blank, whether it is kept."""


def choose(config: Config, files: ScoreFiles, parts: list[Part]) -> Choice:
    """Find the documents to keep: exactly as many as the flags ask for; of equal scores the first in the corpus.

    Every process finds the same ones. This takes 12 bytes of memory for each document of the corpus.

    Raises:
      UserError: if the corpus has no text, or fewer documents than are to be kept.
    """
    none = np.zeros(0, np.float32)
    found = [np.concatenate([none, *(ranks(config, part.number, x) for x in files.read(part))]) for part in parts]
    whole = np.concatenate(found)
    if not len(whole):
        raise UserError(f"{config.corpus} holds no text: give files with text in them.")
    count = config.keep_count or max(1, round((config.keep_fraction or 0) * len(whole)))
    if count > len(whole):
        raise UserError(
            f"--keep-count {count} is more than the {len(whole)} documents in {config.corpus}: give at most {len(whole)} (what "
            "is scored is used again)."
        )
    threshold = np.partition(whole, len(whole) - count)[len(whole) - count]
    kept = whole > threshold
    kept[np.flatnonzero(whole == threshold)[: count - kept.sum()]] = True
    return Choice(float(threshold), np.split(kept, np.cumsum([len(x) for x in found])[:-1]))


def ranks(config: Config, part: int, scored: Scored) -> NDArray[np.float32]:
    """Return what documents are chosen by, float32 `[n]`, highest first: scores, or with --rule gumbel random ranks."""
    if config.rule == "top":
        return scored.score
    return (scored.score / config.temperature + gumbel(config.seed, part, scored.document)).astype(np.float32)


def gumbel(seed: int, part: int, document: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw Gumbel noise, float64 `[n]`: a pure function of the seed, the part's and each document's number.

    The k documents with the highest score / temperature + noise are a sample without replacement with probabilities
    proportional to exp(score / temperature).

    Reference: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", ICML 2019, section 2. The random bits
    are those of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    start = hashlib.blake2b(f"{seed},{part}".encode(), digest_size=8).digest()
    count = document.astype(np.uint64) + np.uint64(1)
    x = np.uint64(int.from_bytes(start, "little")) + count * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))


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
        as_lines = "" if part.stem.lower().endswith(".gz") else ".gz"
        suffix = ".jsonl.gz" if part.source.lines is None else as_lines
        suffix = ".parquet" if self._config.format == "parquet" else suffix
        return self._config.output / SELECTED / f"{part.stem}{suffix}"

    def is_written(self, part: Part) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        note = self._note(part)
        return note.exists() and self.target(part).exists() and read_json(note) == self._noted

    def write(self, part: Part, progress: Progress) -> None:
        """Write the file of a part, in one piece."""
        write = _write_table if self._config.format == "parquet" else _write_documents
        write(self.target(part), part, self._marked(part), progress)
        write_json(self._note(part), self._noted)

    def write_summary(self) -> tuple[int, int]:
        """Write summary.json, the same for every process but for the paths of copies; returns how many of how many are kept."""
        files = [
            {"file": list(part.files) or part.source.name, "documents": len(kept), "kept": int(kept.sum()),
             "output": self.target(part).name}
            for part, kept in zip(self._parts, self._choice.kept, strict=True)
        ]  # fmt: skip
        kept, documents = (sum(file[name] for file in files) for name in ("kept", "documents"))
        summary = {"documents": documents, "kept": kept, "threshold": self._choice.threshold, "files": files}
        write_json(self._config.output / "summary.json", summary)
        return kept, documents

    def _marked(self, part: Part) -> Iterator[tuple[Scored, NDArray[np.bool_]]]:
        before, kept = 0, self._choice.kept[part.number]
        for scored in self._files.read(part):
            yield scored, kept[before : before + len(scored.score)]
            before += len(scored.score)

    def _note(self, part: Part) -> Path:
        return self._config.output / WRITTEN / f"{part.stem}.json"


def _write_table(
    target: Path, part: Part, scored: Iterator[tuple[Scored, NDArray[np.bool_]]], progress: Progress
) -> None:
    with tables.writing(target, SCHEMA, {}) as writer:
        for batch, kept in scored:
            which, number = np.zeros_like(batch.document), batch.document
            if part.files:
                which, number = number, which
            names = pa.array(part.files or (part.source.name,))
            file = pa.DictionaryArray.from_arrays(pa.array(which.astype(np.int32)), names)
            writer.write_table(pa.table([file, number, batch.size, batch.score, kept], schema=SCHEMA))
            progress.advance(len(kept))


def _write_documents(
    target: Path, part: Part, scored: Iterator[tuple[Scored, NDArray[np.bool_]]], progress: Progress
) -> None:
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
