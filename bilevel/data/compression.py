"""Compressed files: known by their first bytes, read with all their members, and written."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from bilevel.types import UserError

Compression = Literal["gzip", "bzip2", "xz", "zstd"]
PACKED_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst")
"""Of compressed files; whether a file is compressed is seen by its first bytes."""
_MAGIC: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to be skipped
}
_LONGEST_MAGIC = 10
_BLOCK = 1 << 20
_READ = 1 << 15
_LARGEST_WINDOW = 1 << 31


def compression(file: io.BufferedReader, name: str) -> Compression | None:
    """Return how a file is compressed, by its first bytes; a name that ends with .gz promises gzip."""
    begin = file.peek(_LONGEST_MAGIC)
    found: Compression | None = next((kind for kind, magic in _MAGIC.items() if magic.match(begin)), None)
    return found or ("gzip" if name.lower().endswith(".gz") else None)


def decompressed(kind: Compression, file: io.BufferedReader, place: Any) -> io.BufferedReader:
    """Return a file that reads what was compressed, of all members, and closes the compressed one with it.

    Raises:
        UserError: zstandard is not installed.
    """
    if kind == "zstd":
        try:
            import zstandard
        except ImportError as error:
            file.close()
            raise _zstandard_is_missing(place) from error
        frames = lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()  # noqa: E731
        return _Decompressed(_ZstdFrames(file, frames), file)
    readers = {"gzip": lambda f: gzip.GzipFile(fileobj=f), "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
    # The readers of compressed files are Python code; a BufferedReader around them splits lines in C.
    return _Decompressed(readers[kind](file), file)


def _zstandard_is_missing(place: Any) -> UserError:
    return UserError(
        f"{place} is compressed with zstd, which needs zstandard: run `pip install 'bilevel[experiments]'`, or compress it "
        "with gzip."
    )


class _Decompressed(io.BufferedReader):
    """Closes the compressed file too, which the readers leave open."""

    def __init__(self, reader: Any, file: io.BufferedReader):
        super().__init__(cast(io.RawIOBase, reader), _BLOCK)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


class _ZstdFrames(io.RawIOBase):
    """Reads one frame after another; raises EOFError where the last is cut off, of which zstandard's reader says nothing."""

    def __init__(self, file: io.BufferedReader, start: Callable[[], Any]):
        self._file, self._start = file, start
        self._frame: Any = None
        self._rest, self._held = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            data = self._rest or self._file.read(_READ)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._start()
            self._held, self._rest = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


def damage() -> tuple[type[Exception], ...]:
    """Return what reading a damaged compressed file raises."""
    found = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    zstandard = sys.modules.get("zstandard")
    return found if zstandard is None else (*found, zstandard.ZstdError)


def compressor(name: str) -> str:
    """Return how a file of that name is compressed, for messages."""
    suffix = Path(name).suffix.lower()
    return {".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".gz": "gzip", ".gzip": "gzip"}.get(suffix, "compressed")


@contextlib.contextmanager
def compressing(path: Path, kind: Compression | None) -> Iterator[BinaryIO]:
    """Open a file that compresses what is written to it; the same content gives the same bytes.

    Raises:
        UserError: zstandard is not installed.
    """
    with path.open("wb") as raw, contextlib.closing(_compressor(raw, kind, path)) as file:
        yield file


def _compressor(raw: BinaryIO, kind: Compression | None, path: Path) -> Any:
    if kind == "gzip":  # no name and no time in the header
        return gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0)
    if kind == "bzip2" or kind == "xz":
        return {"bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[kind](raw, "wb")
    if kind is None:
        return raw
    try:
        import zstandard
    except ImportError as error:
        raise _zstandard_is_missing(path) from error
    return zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
