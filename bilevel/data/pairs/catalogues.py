"""Pairs from gettext catalogues: `.po`, or compiled `.mo`."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from bilevel.data.opening import Place, open_bytes, read_errors
from bilevel.data.pairs.stream import Languages, Pair
from bilevel.data.streams import one_line
from bilevel.data.text.kinds import suffix_of
from bilevel.types import UserError

_MARK = re.compile(r"&(?=\w)(?!#?\w+;)")
_CAPITALS = re.compile(r"\w*[A-Z]&[A-Z]")
_LANGUAGE = re.compile(r"^Language:\s*([A-Za-z]{2,3})(?:[_@.-].*)?$", re.MULTILINE)
_CHARSET = re.compile(rb"charset=([\w-]+)")


class Entry(NamedTuple):
    """A message that is translated."""

    key: str
    """The message with its context: what two catalogues of one program share."""
    source: str
    target: str


def catalogue_pairs(path: Place, languages: Languages) -> Iterator[Pair]:
    """Stream the finished messages of a catalogue, without accelerator marks (`&File`).

    Of a message with plural forms, the singular counts. Fuzzy and obsolete messages are omitted.

    Raises:
        UserError: the file is no catalogue, is one of another language, or translates nothing.
    """
    count = 0
    for entry in entries(path, languages.target):
        count += 1
        yield Pair(without_marks(one_line(entry.source)), without_marks(one_line(entry.target)))
    if not count:
        raise UserError(
            f"The catalogue {path} holds no finished translation (fuzzy ones do not count); give one that is translated to "
            f"{languages.target}, or leave it out."
        )


def without_marks(text: str) -> str:
    """Omit the mark of an accelerator, an `&` in front of a letter; `R&D` and `&nbsp;` stay."""
    marks = _MARK.findall(text)
    return _MARK.sub("", text) if len(marks) == 1 and not _CAPITALS.search(text) else text


def entries(path: Place, language: str | None = None) -> Iterator[Entry]:
    """Stream the finished messages of a catalogue, singular forms only.

    Raises:
        UserError: the file is no catalogue, or its header names another language.
    """
    with open_bytes(path) as file, read_errors(path):
        data = file.read()
    found = _compiled(data, path) if suffix_of(path) == ".mo" else _written(data, path)
    for number, entry in enumerate(found):
        if number == 0 and not entry.source:
            _check_language(entry.target, language, path)
        if entry.source and entry.target:
            yield entry


def _check_language(header: str, language: str | None, path: Place) -> None:
    named = _LANGUAGE.search(header)
    if language and named and named[1].lower() != re.split("[-_]", language)[0].lower():
        raise UserError(
            f"{path} is a catalogue of {named[1]}, and not of {language}; name another one, or say --data.target-language "
            f"{named[1]}."
        )


def _compiled(data: bytes, path: Place) -> Iterator[Entry]:
    """Read a `.mo` file: a magic number, and tables of the lengths and places of messages and translations, sorted."""
    try:
        order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[data[:4]]
        count, messages, translations = struct.unpack_from(f"{order}3I", data, 8)
        for number in range(count):
            texts = []
            for table in (messages, translations):
                length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
                if start + length > len(data):
                    raise ValueError("it ends too early")
                texts.append(data[start : start + length].decode("utf-8"))
            key = texts[0].split("\0")[0]
            yield Entry(key, key.rpartition("\x04")[2], texts[1].split("\0")[0])
    except (KeyError, struct.error, ValueError) as error:
        raise UserError(
            f"{path} is not a compiled catalogue ({error}); compile it again with msgfmt, or give the .po file."
        ) from error


def _written(data: bytes, path: Place) -> Iterator[Entry]:
    try:
        import polib
    except ImportError as error:
        raise UserError(f"Reading {path} needs polib: run `pip install 'bilevel[translation]'`.") from error
    charset = _CHARSET.search(data[:4096])
    encoding = charset[1].decode() if charset and charset[1] != b"CHARSET" else "utf-8"
    try:
        catalogue = polib.pofile(data.decode(encoding) or "\n")
    except (OSError, ValueError, LookupError) as error:
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a catalogue ({found}); correct it, for example with msgfmt --check.") from error
    yield Entry("", "", "\n".join(f"{key}: {value}" for key, value in catalogue.metadata.items()))
    for entry in catalogue:
        if not entry.obsolete and not entry.fuzzy:
            target = entry.msgstr or entry.msgstr_plural.get(0, "")
            yield Entry(f"{entry.msgctxt}\x04{entry.msgid}" if entry.msgctxt else entry.msgid, entry.msgid, target)
