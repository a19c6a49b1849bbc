"""What a source of text is, and the small rules that all kinds of sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bilevel.data.opening import Place
from bilevel.data.text.stored import Stored


class Document(NamedTuple):
    """One document as its source gives it."""

    text: bytes
    """UTF-8 bytes without the line end. A blank line is `b""`, so that document numbers stay line numbers."""
    label: str | None = None
    """The domain of the document, if the source knows it."""
    prompt: int = 0
    """The bytes at the beginning of the text that are given, and not to be predicted."""


FIELD, DOCUMENTS = (f"--data.{name}, or --{name} of bilevel select" for name in ("field", "documents"))
"""The flags of `Options`, for messages."""


class Options(NamedTuple):
    """Which of the options of `open_source` a source has a use for."""

    field: bool
    documents: bool


@dataclass(frozen=True)
class Source:
    """A stream of documents that can be read again and again.

    A source is made by `open_source` or `open_specific`.
    """

    name: str
    """For messages and manifests."""
    read: Callable[[], Iterator[Document]]
    """Starts a new pass over the documents, blank ones included."""
    identify: Callable[[], str]
    """Computes what `fingerprint` returns."""
    labelled: bool = False
    """Whether every document carries a label."""
    paths: tuple[Place, ...] = ()
    """The files that are read, one after another; empty for what is not read from files that the user named."""
    stored: Stored | None = None
    """The records of the file, where the source is one file in which record i, a line or a row, holds document i."""

    def documents(self) -> Iterator[bytes]:
        """Stream the UTF-8 bytes of each document; a blank document (to be skipped) is `b""`.

        Raises:
            UserError: the source is broken (bad UTF-8, bad JSON, bad gzip, no text at all); the message names
                the place.
        """
        return (document.text for document in self.read())

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the documents may have changed; it reads almost nothing.

        Files up to 1 MiB count by their name and whole content; larger ones by name, size, modification time
        and three samples of 64 KiB (start, middle, end). Folders do not count, so data may be moved. TFDS
        data count by the name, version and split, and the name, size and modification time of their files;
        Python's own files by the Python version, their names and their sizes.
        """
        return self.identify()


def digest(parts: Iterable[str | int | bytes]) -> str:
    """A 32-digit hexadecimal BLAKE2b digest of `parts`, in which the borders between them count."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def text_hash(text: bytes) -> int:
    """A 64-bit BLAKE2b hash of a document's text: what decides, whatever the order, in which part it falls."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def pieces_of(lines: Iterable[bytes], *, at_least: int = 320, shortest_tail: int = 120) -> Iterator[bytes]:
    """Join lines into pieces that end with the first line end at or after `at_least` bytes.

    Args:
        lines: lines with their line ends.
        at_least: bytes of a piece, the last one excepted.
        shortest_tail: a last piece shorter than this joins the one before it.

    Yields:
        Pieces that are not blank; joined, they are the lines (blank pieces left out).
    """
    held: bytes | None = None
    current: list[bytes] = []
    size = 0
    for line in lines:
        current.append(line)
        size += len(line)
        if size >= at_least:
            if held is not None and held.strip():
                yield held
            held, current, size = b"".join(current), [], 0
    tail = b"".join(current)
    if held is not None and len(tail) < shortest_tail:
        held, tail = held + tail, b""
    for piece in (held, tail):
        if piece is not None and piece.strip():
            yield piece
