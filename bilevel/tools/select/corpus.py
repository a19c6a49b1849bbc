"""The corpus, in parts that are scored and written one by one."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bilevel.data import Source, digest, open_source
from bilevel.data.opening import Place, open_bytes, size_of, stamp_of
from bilevel.data.text.files import source_of_files
from bilevel.tools.select.config import Config
from bilevel.types import UserError

FILES_IN_PART = 256
"""Where whole files are documents, this many make up a part."""
T = TypeVar("T")


class Part(NamedTuple):
    """A file of the corpus; or a run of files that are a document each; or a source that is not made of files.

    What reads it raises a `UserError` if a file is gone.
    """

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

    def state(self) -> dict[str, list[Any]]:
        """Return size and time of each file: while they stay, the text has stayed."""
        with self._reading():
            sizes, times = ([of(path) for path in self.source.paths] for of in (size_of, stamp_of))
            return {"sizes": sizes or [self.source.fingerprint()], "times": times}

    def content(self) -> str:
        """Return a digest of all bytes; of what is not made of files, its fingerprint."""
        with self._reading():
            return digest(map(_hash, self.source.paths)) if self.source.paths else self.source.fingerprint()

    def stream(self, read: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Stream `source.read` or `source.lines`."""
        with self._reading():
            yield from read()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Cannot read {self.source.name} ({error.strerror or error}): put it back, or select from other files."
            ) from error


def open_parts(config: Config) -> list[Part]:
    """Return the parts of the corpus in order; the same for all processes.

    Raises:
      UserError: for data that are missing or of the wrong kind.
    """
    whole = open_source(config.corpus, field=config.field, documents=config.documents, blank_files=True)
    if not whole.paths:
        return [Part(0, whole)]
    size, parts = 1 if config.documents == "line" else FILES_IN_PART, []
    for start in range(0, len(whole.paths), size):
        paths = list(whole.paths[start : start + size])
        files = tuple(map(str, paths)) if config.documents == "file" else ()
        name = "files" if files else str(paths[0])
        source = source_of_files(name, paths, config.field, config.documents, blank_files=True)
        parts.append(Part(len(parts), source, files))
    return parts


def _hash(path: Place) -> bytes:
    with open_bytes(path, decompress=False) as file:
        return hashlib.file_digest(file, "blake2b").digest()
