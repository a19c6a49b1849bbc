"""The text of a record: of one field or of several, which may lie inside others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.data.digests import FIELD
from bilevel.data.records import cell
from bilevel.types import UserError

DEFAULT = "text"
BETWEEN = b"\n\n"
"""Joins the texts of several fields."""
_MISSING: Any = object()


def field_names(field: str | None) -> tuple[str, ...]:
    """Return the names in "title,meta.text".

    Raises:
        UserError: one of them is empty.
    """
    names = tuple(name.strip() for name in (DEFAULT if field is None else field).split(","))
    if not all(names):
        raise UserError(f"field={field!r} holds an empty name; write names separated by commas ({FIELD}).")
    return names


def joined(texts: Sequence[bytes | None]) -> bytes:
    """Join the texts that are not blank by blank lines; of one text alone, return it, or b"" if it is blank."""
    return BETWEEN.join(text for text in texts if text and text.strip())


def record_text(record: Mapping[str, Any], names: Sequence[str], where: str, *, first: bool = True) -> bytes:
    """Return the text of a record; what is null is blank.

    Args:
        record: by field.
        names: the fields, from `field_names`.
        where: for messages.
        first: all fields must be there; of several ones, later records may lack some.

    Raises:
        UserError: a field is missing or holds no text.
    """
    if len(names) == 1 and isinstance(value := record.get(names[0]), str):  # nearly always
        text = value.encode("utf-8") if value.isascii() else _text(value, names[0], where)
        return text if text and text.strip() else b""
    values = [cell(record, name, _MISSING) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value is _MISSING]
    if missing and (first or len(missing) == len(names)):
        found = ", ".join(map(repr, list(record)[:20])) or "none"
        raise UserError(
            f"{where}: no field {missing[0]!r}; the fields found are: {found}; name the text with field=... ({FIELD})."
        )
    return joined([_text(value, name, where) for name, value in zip(names, values, strict=True)])


def _text(value: Any, name: str, where: str) -> bytes | None:
    try:
        if isinstance(value, str):
            return value.encode("utf-8")
        if value is None or value is _MISSING:
            return None
        if isinstance(value, bytes):
            value.decode("utf-8")
            return value
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field {name!r} holds half a surrogate pair at character {error.start + 1}; "
            "remove it or write the whole character."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the field {name!r} is not UTF-8; convert it.") from error
    kind = type(value).__name__
    raise UserError(
        f"{where}: the field {name!r} holds a {kind} instead of a string; name the text with field=... ({FIELD})."
    )


def record_key(record: Mapping[str, Any], name: str, where: str, flag: str) -> str | int:
    """Return what identifies a record, or its group; `flag` is where the user names the field.

    Raises:
        UserError: it has no such field, or one that holds neither a text nor a whole number.
    """
    value = cell(record, name, _MISSING)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = "is missing" if value is _MISSING else f"holds a {type(value).__name__}"
        raise UserError(f"{where}: the field {name!r} {found}; name a text or whole number in every record ({flag}).")
    return value
