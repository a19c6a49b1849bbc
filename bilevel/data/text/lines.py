"""Lines of text files, and the JSON in them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from bilevel.data.opening import Place, open_bytes, read_errors
from bilevel.types import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def line_blocks(path: Place) -> Generator[list[bytes]]:
    """Stream the lines of a file, line ends included, in lists of about 1 MiB, checked to be UTF-8.

    Raises:
        UserError: the file cannot be read, is compressed and broken, or a line is not UTF-8.
    """
    with open_bytes(path) as stream:
        before = 0
        while block := _next_block(stream, path):
            if before == 0:
                block[0] = block[0].removeprefix(BYTE_ORDER_MARK)
            _check_utf8(block, path, before)
            before += len(block)
            yield block


def lines_of(path: Place) -> Iterator[str]:
    """Stream the lines of a file without their ends."""
    return (line.rstrip(b"\r\n").decode("utf-8") for block in line_blocks(path) for line in block)


def _next_block(stream: BinaryIO, path: Place) -> list[bytes]:
    with read_errors(path):
        return stream.readlines(_BLOCK)


def _check_utf8(lines: list[bytes], path: Place, before: int) -> None:
    try:
        b"".join(lines).decode("utf-8")
    except UnicodeDecodeError:
        for number, line in enumerate(lines, start=before + 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) "
                    "is not UTF-8; convert the file to UTF-8 (for example with iconv) or remove the line."
                ) from error


def json_object(line: bytes | str, where: str) -> dict[str, Any]:
    """Read the JSON object of a line; a UserError that begins with `where` says that it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); every line must hold one JSON object.") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise UserError(f"{where}: a JSON {kind} instead of an object; write one JSON object a line.")
    return record
