"""Text that comes with every Python: the standard library's source code and the language reference."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from bilevel.data.digests import Document, Source, digest, pieces_of
from bilevel.types import UserError

# pydoc_data holds the text of `python:topics`: as generic data it would leak the specific test set.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
_LARGEST_FILE = 1 << 18  # bytes; larger files are generated tables
_PARTS = ("train", "valid", "test")


def stdlib_source() -> Source:
    """The source files of the running Python's standard library, in pieces of about 350 bytes.

    The label of a piece is its top-level module or package. Left out: tests, idlelib, lib2to3, installed
    packages, files that are not UTF-8, files over 256 KiB, and pydoc_data, which holds the text of
    `python:topics`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _stdlib_files(root)
    if not files:
        raise UserError(
            f"python:stdlib found no source files in {root}; use a Python that is installed with its "
            "sources, or give text files."
        )

    def read() -> Iterator[Document]:
        for path in files:
            relative = path.relative_to(root)
            label = relative.parts[0].removesuffix(".py")
            data = path.read_bytes()
            if _is_utf8(data):
                yield from (Document(piece, label) for piece in pieces_of(data.splitlines(keepends=True)))

    def identify() -> str:
        sizes = (f"{path.relative_to(root).as_posix()}:{path.stat().st_size}" for path in files)
        return digest(["stdlib", sys.version, *sizes])

    return Source("python:stdlib", read, identify, labelled=True)


def _stdlib_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        found.extend(path for path in paths if 0 < path.stat().st_size <= _LARGEST_FILE)
    return found


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def topics_source() -> Source:
    """The Python language reference (`pydoc_data.topics`), in pieces of about 350 bytes labelled by topic."""
    return _source_of_topics("python:topics", _own_text())


def topics_parts() -> dict[str, Source]:
    """The language reference split by topic into train, valid and test, about 80, 10 and 10 percent of its
    bytes."""
    texts = _own_text()
    total = sum(map(len, texts.values()))
    chosen: dict[str, dict[str, bytes]] = {part: {} for part in _PARTS}
    size: dict[str, int] = dict.fromkeys(_PARTS, 0)
    for topic in sorted(texts, key=lambda topic: hashlib.blake2b(topic.encode()).digest()):
        # A topic larger than a twentieth of all would make up half of a small part: it goes to train.
        small = len(texts[topic]) <= total / 20
        open_parts = [part for part in ("test", "valid") if small and size[part] < total / 10]
        part = open_parts[0] if open_parts else "train"
        chosen[part][topic] = texts[topic]
        size[part] += len(texts[topic])
    return {part: _source_of_topics(f"python:topics ({part})", chosen[part]) for part in _PARTS}


def _source_of_topics(name: str, texts: dict[str, bytes]) -> Source:
    def read() -> Iterator[Document]:
        for topic, text in texts.items():
            yield from (Document(piece, topic) for piece in pieces_of(text.splitlines(keepends=True)))

    def identify() -> str:
        return digest(["topics", *(part for item in texts.items() for part in item)])

    return Source(name, read, identify, labelled=True)


def _own_text() -> dict[str, bytes]:
    """Each topic's text, every paragraph in one topic only, in the order of the topics' names.

    Long topics repeat short ones ("compound" holds all of "if"). A paragraph stays in the shortest topic that
    has it, so that topics are disjoint and a split by topic does not leak.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts: dict[str, bytes] = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        texts[topic] = _join(p for p in re.split(r"\n\s*\n", topics[topic]) if not _known(p.strip(), seen))
    return {topic: texts[topic] for topic in sorted(texts) if texts[topic].strip()}


def _known(paragraph: str, seen: set[str]) -> bool:
    known = paragraph in seen
    seen.add(paragraph)
    return known or not paragraph


def _join(paragraphs: Iterable[str]) -> bytes:
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs).encode("utf-8")
