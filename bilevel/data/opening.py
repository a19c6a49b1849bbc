"""Opening data by path or URL: local files directly, `s3://`, `https://` and the like through fsspec."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bilevel.data.compression import Compression, compression, compressor, damage, decompressed
from bilevel.data.notes import note, some
from bilevel.types import UserError

Place = Path | str
"""Where a file is: a local path, or a URL as `str`."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BLOCK = 1 << 20


@contextlib.contextmanager
def given_by(flag: str) -> Iterator[None]:
    """Let an error in opening what a flag gave begin with the flag, unless it names it: "--data.generic: The file …".

    Raises:
        UserError: in place of one that does not name the flag.
    """
    try:
        yield
    except UserError as error:
        if re.search(rf"{flag}(?![\w-])", str(error)):
            raise
        raise UserError(f"{flag}: {error}") from error


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
        decompress: read what is compressed with gzip, bzip2, xz or zstd (by its first bytes; `.gz` always is) as what was
            compressed.

    Returns:
        A buffered file. Reading what is damaged raises an exception that `read_errors` knows.

    Raises:
        FileNotFoundError: there is no such local file.
        UserError: the file cannot be opened, or a package for it is not installed.
    """
    with read_errors(place):
        raw: Any = place.open("rb") if isinstance(place, Path) else _filesystem(place)[0].open(place, "rb")
        file = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, _BLOCK)
        kind = compression(file, name_of(place)) if decompress else None
        return file if kind is None else decompressed(kind, file, place)


def compression_of(place: Place) -> Compression | None:
    """Return how a file is compressed; errors as `open_bytes`."""
    with open_bytes(place, decompress=False) as file, read_errors(place):
        return compression(file, name_of(place))


def exists(place: Place) -> bool:
    """Whether there is such a file."""
    if isinstance(place, Path):
        with read_errors(place):
            try:
                os.stat(place)
            except PermissionError:
                raise
            except (OSError, ValueError):  # not there, or no name at all
                return False
        return os.path.isfile(place)
    with read_errors(place):
        system, path = _filesystem(place)
        return bool(system.exists(path))


def is_folder(place: Place) -> bool:
    """Whether there is such a folder; web addresses are folders if they end with a slash."""
    if isinstance(place, Path):
        return os.path.isdir(place)
    if _is_web(place):  # to ask is to download the file
        return place.endswith("/")
    with read_errors(place):
        system, path = _filesystem(place)
        return bool(system.isdir(path))


def entries_in(folder: Place) -> list[Place]:
    """Return what is directly in a folder, sorted by name; what is hidden does not count. Behind a URL: the files.

    Raises:
        UserError: the folder cannot be read, or holds a link to nothing.
    """
    if isinstance(folder, Path):
        with read_errors(folder):
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
            found: list[Place] = [folder / entry.name for entry in shown]
            for entry in shown:
                if entry.is_symlink():
                    _check_link(folder / entry.name)
    else:
        found = _matching(folder.rstrip("/") + "/*")
    return sorted(found, key=name_of)


def _check_link(path: Place) -> None:
    if isinstance(path, Path) and path.is_symlink() and not os.path.exists(path):
        raise UserError(f"{path} is a link to nothing; remove it, or put back what it links to.")


def is_plain_file(place: Place) -> bool:
    """Whether an entry of a folder is a file, and neither a folder nor a device."""
    return isinstance(place, str) or place.is_file()


def identity_of(place: Place) -> tuple[int, int] | str:
    """Return what is the same for all names of a file: links, hard links, and paths that lead to it."""
    if isinstance(place, str):
        return place
    status = os.stat(place)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(place)


def has_magic(name: str) -> bool:
    """Whether a name is a pattern; the question mark of a web address begins a query."""
    return glob.has_magic(name.replace("?", "") if _is_web(name) else name)


def matching(pattern: str) -> list[Place]:
    """Return the files that match a pattern, sorted.

    Raises:
        UserError: a folder cannot be read, or a link leads to nothing.
    """
    if is_url(pattern):
        return _matching(pattern)
    with read_errors(Path(pattern)):
        found = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
        for match in found:
            _check_link(match)
        files: list[Place] = [match for match in sorted(found) if match.is_file()]
    folders = sorted(f"{match}/" for match in found if match.is_dir()) if "**" not in pattern else []
    if files and folders:
        note(f"{pattern} also matches folders, which are not read: {some(folders)}.")
    return files


def _matching(pattern: str) -> list[Place]:
    with read_errors(pattern):
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
    with read_errors(place):
        system, path = _filesystem(place)
        return system.info(path).get("size")


def stamp_of(place: Place) -> int | str:
    """Return what changes with a file: its modification time in ns, or what the store of a URL says of its version."""
    if isinstance(place, Path):
        return place.stat().st_mtime_ns
    with read_errors(place):
        system, path = _filesystem(place)
        return str(system.ukey(path))


def hash_of(place: Place) -> bytes:
    """Return the BLAKE2b digest of all bytes of a file; errors as `open_bytes`."""
    with open_bytes(place, decompress=False) as file:
        return hashlib.file_digest(file, "blake2b").digest()


@contextlib.contextmanager
def read_errors(place: Place) -> Iterator[None]:
    """Turn what reading a file or a folder raises into one sentence: an OSError, damage, and for a URL any exception.

    Raises:
        FileNotFoundError: a local file is gone.
        UserError: instead of the others.
    """
    try:
        yield
    except UserError:
        raise
    except damage() as error:
        name = name_of(place)
        or_rename = ", or remove .gz from its name if it is not compressed" if name.lower().endswith(".gz") else ""
        raise UserError(
            f"{place} is not a complete {compressor(name)} file ({error}); copy or compress it again{or_rename}."
        ) from error
    except OSError as error:
        if is_url(place):
            raise _remote(place, error) from error
        where = error.filename or place
        if isinstance(error, PermissionError):
            kind = "folder" if os.path.isdir(where) else "file"
            raise UserError(f"The {kind} {where} cannot be read; change its permissions.") from error
        if isinstance(error, FileNotFoundError):  # it was there before: callers know more
            raise
        raise UserError(f"{where} cannot be read ({error.strerror or error}); check the path and the disk.") from error
    except Exception as error:  # each store has exceptions of its own
        if not is_url(place):
            raise
        raise _remote(place, error) from error


def _remote(place: Place, error: Exception) -> UserError:
    found = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return UserError(f"Reading {place} needs a package that is not installed ({found}): install it.")
    if isinstance(error, FileNotFoundError):
        return UserError(f"The file {place} does not exist; check the address.")
    return UserError(f"{place} cannot be read ({found}): check the address, the network and your access there.")


def _is_web(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(f"Reading {url} needs fsspec: run `pip install 'bilevel[remote]'`.") from error
    return url_to_fs(url)
