"""The corpus in parts: what is scored, written and shared out as one piece."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bilevel.data import Source, digest, open_source
from bilevel.data.opening import open_bytes, size_of, stamp_of
from bilevel.data.text.files import source_of_files
from bilevel.tools.select.config import Config
from bilevel.types import UserError

FILES_IN_PART = 256
"""Where whole files are documents, this many make up a part."""
_LONGEST_NAME = 100
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
        return f"{self.number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(self.source.name).name)[-_LONGEST_NAME:]}"


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
    """Stream what the source of a part reads, `part.source.read` or `part.source.lines`.

    Raises:
      UserError: if it cannot be read, or is broken.
    """
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
