"""Opening data by path or URL: local files directly, `s3://`, `https://` and the like through fsspec."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from bilevel.types import UserError

Place = Path | str
"""Where a file is: a local path, or a URL as `str`."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 1 << 20


def is_url(name: Place) -> bool:
    """Whether a name is a URL, such as `s3://bucket/a.txt`."""
    return isinstance(name, str) and _URL.match(name) is not None


def place_of(name: Place) -> Place:
    """Return a URL as it is, and anything else as a path with `~` replaced."""
    return name if is_url(name) else Path(os.path.expanduser(name))


def name_of(place: Place) -> str:
    """Return the last part of a path or URL, without the query of a web address."""
    if isinstance(place, Path):
        return place.name
    return PurePosixPath(place.split("?")[0] if _is_web(place) else place).name


def open_bytes(place: Place, *, decompress: bool = True) -> io.BufferedReader:
    """Open a file for reading.

    Args:
        place: a path or URL.
        decompress: read what is compressed with gzip (by its name, or its first bytes) as what was compressed.

    Returns:
        A buffered file.

    Raises:
        OSError: a local file cannot be opened.
        UserError: a URL cannot be opened, or fsspec is not installed.
    """
    with remote_errors(place):
        raw: Any = place.open("rb") if isinstance(place, Path) else _filesystem(place)[0].open(place, "rb")
        file = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _BLOCK)
        if decompress and (name_of(place).lower().endswith(".gz") or file.peek(2)[:2] == _GZIP_MAGIC):
            # GzipFile.readline is Python code; a BufferedReader around it splits lines in C.
            return _Decompressed(file)
    return file


class _Decompressed(io.BufferedReader):
    """Closes the compressed file too, which GzipFile leaves open."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), _BLOCK)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


def exists(place: Place) -> bool:
    """Whether there is such a file."""
    if isinstance(place, Path):
        return os.path.isfile(place)  # unlike pathlib, answers for what is too long to be a name, too
    with remote_errors(place):
        system, path = _filesystem(place)
        return bool(system.exists(path))


def is_folder(place: Place) -> bool:
    """Whether there is such a folder; web addresses are folders if they end with a slash."""
    if isinstance(place, Path):
        return os.path.isdir(place)
    if _is_web(place):  # to ask is to download the file
        return place.endswith("/")
    with remote_errors(place):
        system, path = _filesystem(place)
        return bool(system.isdir(path))


def files_in(folder: Place) -> list[Place]:
    """Return the files directly in a folder, sorted by name; hidden files do not count.

    Raises:
        UserError: the folder cannot be read.
    """
    if isinstance(folder, Path):
        try:
            found: list[Place] = [path for path in folder.iterdir() if path.is_file()]
        except PermissionError as error:
            raise UserError(f"The folder {folder} cannot be read; change its permissions.") from error
    else:
        found = _matching(folder.rstrip("/") + "/*")
    return sorted((place for place in found if not name_of(place).startswith(".")), key=name_of)


def has_magic(name: str) -> bool:
    """Whether a name is a pattern; the question mark of a web address begins a query."""
    return glob.has_magic(name.replace("?", "") if _is_web(name) else name)


def matching(pattern: str) -> list[Place]:
    """Return the files that match a pattern, sorted."""
    if is_url(pattern):
        return _matching(pattern)
    found = (Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    return sorted(match for match in found if match.is_file())


def _matching(pattern: str) -> list[Place]:
    with remote_errors(pattern):
        system, path = _filesystem(pattern)
        found = [
            system.unstrip_protocol(k) for k, info in system.glob(path, detail=True).items() if info["type"] == "file"
        ]
    hidden = name_of(pattern).startswith(".")  # as for local files, only a pattern with a dot in front finds these
    return sorted(url for url in found if hidden or not name_of(url).startswith("."))


def size_of(place: Place) -> int | None:
    """Return the bytes of a file; None where a server does not say."""
    if isinstance(place, Path):
        return place.stat().st_size
    with remote_errors(place):
        system, path = _filesystem(place)
        return system.info(path).get("size")


def stamp_of(place: Place) -> int | str:
    """Return what changes with a file: its modification time in ns, or what the store of a URL says of its version."""
    if isinstance(place, Path):
        return place.stat().st_mtime_ns
    with remote_errors(place):
        system, path = _filesystem(place)
        return str(system.ukey(path))


def hash_of(place: Place) -> bytes:
    """Return the BLAKE2b digest of all bytes of a file; errors as `open_bytes`."""
    with open_bytes(place, decompress=False) as file:
        return hashlib.file_digest(file, "blake2b").digest()


@contextlib.contextmanager
def remote_errors(place: Place) -> Iterator[None]:
    """Turn whatever the library behind a URL raises into one sentence; nothing is changed for local files.

    Raises:
        UserError: instead of any exception but this one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has exceptions of its own
        if not is_url(place):
            raise
        found = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ImportError):
            raise UserError(f"Reading {place} needs a package that is not installed ({found}): install it.") from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"The file {place} does not exist; check the address.") from error
        raise UserError(
            f"{place} cannot be read ({found}): check the address, the network and your access there."
        ) from error


def _is_web(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(f"Reading {url} needs fsspec: run `pip install 'bilevel[remote]'`.") from error
    return url_to_fs(url)
