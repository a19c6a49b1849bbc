"""The corpus in parts: what is scored, written and shared out as one piece."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bilevel.data import Document, Source, digest, file_fingerprint, open_source
from bilevel.data.opening import Place, open_bytes, place_of, stamp_of
from bilevel.types import UserError
from experiments.select.config import Config

FILES_IN_PART = 256
"""Where whole files are documents, this many make up a part."""
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Part:
    """A file of the corpus; or a run of files that are a document each; or a source that is not made of files."""

    number: int
    """Position in the corpus."""
    name: str
    """File, or source, for messages."""
    source: Source
    """Its documents."""
    files: tuple[str, ...] = ()
    """The file of each document, where files are documents; else empty."""

    @property
    def paths(self) -> tuple[Place, ...]:
        """All files of the part; empty if it is not made of files."""
        return self.source.paths or tuple(map(place_of, self.files))

    @property
    def stem(self) -> str:
        """Beginning of the names of the files written for this part."""
        return f"{self.number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(self.name).name)[-_LONGEST_NAME:]}"


def open_parts(config: Config) -> list[Part]:
    """The parts of the corpus in order; the same for all processes.

    Raises:
      UserError: for data that is missing or of the wrong kind.
    """

    def open_one(spec: str) -> Source:
        return open_source(spec, field=config.field, documents=config.documents, blank_files=True)

    whole = open_one(config.corpus)
    if not whole.paths:
        return [Part(0, whole.name, whole)]
    paths = [str(path) for path in whole.paths]
    if config.documents == "line":
        return [Part(i, path, open_one(path)) for i, path in enumerate(paths)]
    groups = [paths[i : i + FILES_IN_PART] for i in range(0, len(paths), FILES_IN_PART)]
    return [_part_of_files(i, group, open_one) for i, group in enumerate(groups)]


def _part_of_files(number: int, paths: list[str], open_one: Callable[[str], Source]) -> Part:
    def read() -> Iterator[Document]:
        for path in paths:
            yield from open_one(path).read()

    source = Source("files", read, lambda: digest([open_one(path).fingerprint() for path in paths]))
    return Part(number, "files", source, tuple(paths))


def fingerprint(part: Part) -> str:
    """A digest that copies of a corpus share: of names, sizes and samples of the files, as `Source.fingerprint` without times.

    Raises:
      UserError: if a file is gone.
    """
    with reading(part):
        found = [file_fingerprint(path, times=False) for path in part.paths]
        return digest(found) if found else part.source.fingerprint()


def times(part: Part) -> list[int | str]:
    """The modification times of the files of a part, in ns: while they stay, its text has stayed.

    Raises:
      UserError: if a file is gone.
    """
    with reading(part):
        return [stamp_of(path) for path in part.paths]


def content(part: Part) -> str:
    """A digest of all bytes of the files of a part, which are read for it; of what is not made of files, the fingerprint.

    Raises:
      UserError: if a file cannot be read.
    """
    hashes = []
    with reading(part):
        for path in part.paths:
            with open_bytes(path, decompress=False) as file:
                hashes.append(hashlib.file_digest(file, "blake2b").digest())
    return digest(hashes) if hashes else fingerprint(part)


@contextlib.contextmanager
def reading(part: Part) -> Iterator[None]:
    """Says of what fails to be read that it is the corpus.

    Raises:
      UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot read {part.name} ({error.strerror or error}): put it back, or select from other files."
        ) from error


def documents_of(part: Part) -> Iterator[Document]:
    """Streams the documents of a part.

    Raises:
      UserError: if they cannot be read, or are broken.
    """
    with reading(part):
        yield from part.source.read()


def lines_of(part: Part) -> Iterator[list[bytes]]:
    """Streams the original lines of a part whose source has lines, in lists of about 1 MiB; errors as `documents_of`."""
    assert part.source.lines is not None
    with reading(part):
        yield from part.source.lines()
