"""A corpus in parts, each of which is worked on and kept by itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from bilevel.data.digests import Source, digest
from bilevel.data.opening import hash_of, name_of, place_of, size_of, stamp_of
from bilevel.data.text.files import source_of_files
from bilevel.data.text.kinds import Documents
from bilevel.data.text.sources import open_source
from bilevel.types import UserError

FILES_IN_PART = 256
"""Where whole files are documents, this many make up a part."""
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
        return f"{self.number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name_of(place_of(self.source.name)))[-100:]}"

    def state(self) -> dict[str, list[Any]]:
        """Return size and time of each file: while they stay, the text has stayed."""
        with self._reading():
            sizes, times = ([of(path) for path in self.source.paths] for of in (size_of, stamp_of))
            return {"sizes": sizes or [self.source.fingerprint()], "times": times}

    def content(self) -> str:
        """Return a digest of all bytes; of what is not made of files, its fingerprint."""
        with self._reading():
            return digest(map(hash_of, self.source.paths)) if self.source.paths else self.source.fingerprint()

    def stream(self, read: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Stream what `read` gives of the documents, such as `source.read`."""
        with self._reading():
            yield from read()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise a `UserError` if a file is gone."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Cannot read {self.source.name} ({error.strerror or error}): put it back, or select from other files."
            ) from error


def open_parts(spec: str, *, field: str | None = None, documents: Documents = "line") -> list[Part]:
    """Return the parts of a corpus in order, the same for all processes; the arguments are those of `open_source`.

    Raises:
        UserError: says what is wrong with the data.
    """
    whole = open_source(spec, field=field, documents=documents, blank_files=True)
    if not whole.paths:
        return [Part(0, whole)]
    size, parts = 1 if documents == "line" else FILES_IN_PART, []
    for start in range(0, len(whole.paths), size):
        paths = list(whole.paths[start : start + size])
        files = tuple(map(str, paths)) if documents == "file" else ()
        name = "files" if files else str(paths[0])
        source = source_of_files(name, paths, field, documents, blank_files=True)
        parts.append(Part(len(parts), source, files))
    return parts
