"""Pairs from tables with a column for each language: TSV, JSON lines, Parquet, TensorFlow Datasets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from bilevel.data.opening import Place
from bilevel.data.pairs.stream import Languages, Pair
from bilevel.data.records import all_records, parquet_records
from bilevel.data.streams import one_line
from bilevel.data.text.lines import json_object, lines_of
from bilevel.data.tfds import identify_records, open_records
from bilevel.types import UserError

_NESTED = ("translation", "translations")
_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")
ColumnNames = tuple[str, str]
"""The names of the source and the target column."""


def tsv_pairs(path: Place, languages: Languages, columns: ColumnNames | None) -> Iterator[Pair]:
    """Stream the rows of a table with tab-separated columns.

    If its first line names the source or the target language, or --data.columns is given, the first line names the columns, in
    which an empty cell is a missing translation. Otherwise the first two columns are source and target.
    """
    lines = lines_of(path)
    first = next(lines, "")
    cells = first.split("\t")
    second = next(lines, None)
    rest = (line for start in (() if second is None else (second,), lines) for line in start)
    if columns or _is_header(cells, second, languages):
        places = [cells.index(name) for name in chosen_columns(cells, languages, columns, path)]
        for line in rest:
            found = line.split("\t")
            source, target = (one_line(found[i]) if i < len(found) else "" for i in places)
            yield Pair(source, target)
        return
    for number, line in enumerate((line for start in ((first,), rest) for line in start), start=1):
        found = line.split("\t")
        if len(found) < 2 and line.strip():
            raise UserError(
                f"{path}, line {number}: there is one column; write source and target with a tab between them, or name the "
                "columns in the first line by their languages."
            )
        yield Pair(one_line(found[0]), one_line(found[1] if len(found) > 1 else ""))


def _is_header(cells: Sequence[str], second: str | None, languages: Languages) -> bool:
    if set(cells) & set(languages) or {"source", "target"} <= set(cells):
        return True
    codes = len(cells) > 1 and all(map(_CODE.fullmatch, cells))
    return codes and not all(map(_CODE.fullmatch, (second or "").split("\t")))


def chosen_columns(
    found: Collection[str], languages: Languages, columns: ColumnNames | None, where: Place
) -> tuple[str, str]:
    """Return the columns of the two languages: those given, else those called by the languages, else source and target.

    Raises:
        UserError: one of them is missing; the message names what is there.
    """
    named = columns or (("source", "target") if {"source", "target"} <= set(found) else languages)
    wanted = languages if columns is None and set(languages) <= set(found) else named
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{where} has no column {' and no column '.join(map(repr, missing))}, but {', '.join(map(repr, list(found)[:20]))}; "
            "choose other languages with --data.source-language and --data.target-language, or name the two columns with "
            "--data.columns SOURCE,TARGET."
        )
    source, target = wanted
    return source, target


def json_pairs(path: Place, languages: Languages, columns: ColumnNames | None) -> Iterator[Pair]:
    """Stream JSON lines: `{"en": …, "cs": …}`, or with both in an object called translation.

    The first line must have both; one that later lacks a language, or has null there, is a missing translation.
    """
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            yield Pair("", "")
            continue
        where = f"{path}, line {number}"
        yield _pair_of(json_object(line, where), languages, columns, where, checked=number == 1)


def parquet_pairs(path: Place, languages: Languages, columns: ColumnNames | None) -> Iterator[Pair]:
    """Stream the rows of a Parquet file, with a column for each language or both in one called translation."""
    for number, record in enumerate(
        parquet_records(path, lambda schema: _read_columns(schema, languages, columns, path))
    ):
        yield _pair_of(record, languages, columns, str(path), checked=number == 0)


def _read_columns(schema: Any, languages: Languages, columns: ColumnNames | None, path: Place) -> list[str]:
    """Return the columns of a Parquet file that hold pairs."""
    import pyarrow as pa

    names = list(schema.names)
    nested = [name for name in _NESTED if name in names and pa.types.is_struct(schema.field(name).type)]
    return nested[:1] or list(dict.fromkeys(chosen_columns(names, languages, columns, path)))


def _pair_of(
    record: Mapping[str, Any], languages: Languages, columns: ColumnNames | None, where: str, *, checked: bool
) -> Pair:
    inner = next((record[name] for name in _NESTED if isinstance(record.get(name), Mapping)), record)
    if checked:
        names = chosen_columns(inner, languages, columns, where)
    elif columns or set(languages) & set(inner):
        names = columns or languages
    else:
        names = ("source", "target")
    source, target = (_text(inner.get(name), name, where) for name in names)
    return Pair(source, target)


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    text = value.decode("utf-8", "strict") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {name!r} holds a {type(value).__name__} instead of a text; name the two columns with --data.columns "
            "SOURCE,TARGET."
        )
    return one_line(text)


def tfds_pairs(records: Any, spec: str, languages: Languages, columns: ColumnNames | None) -> Iterator[Pair]:
    """Stream the records of a TFDS data set with the feature Translation or TranslationVariableLanguages."""
    for number, record in enumerate(all_records(records)):
        found = _spread(record)
        yield _pair_of(found or record, languages, columns, spec, checked=number == 0 and found is None)


def _spread(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Turn {"language": [en, cs], "translation": […]} into {en: …, cs: …}: languages that vary from record to record."""
    inner = next((record[name] for name in _NESTED if isinstance(record.get(name), Mapping)), record)
    if set(inner) != {"language", "translation"}:
        return None
    languages = [name.decode() if isinstance(name, bytes) else name for name in inner["language"]]
    return dict(zip(languages, inner["translation"], strict=True))


def open_tfds(spec: str, name: str, split: str, languages: Languages, columns: ColumnNames | None) -> Any:
    """Open the records of a TFDS split, whose first one must have both languages.

    Raises:
        UserError: as `bilevel.data.tfds.open_records`, or a language is missing.
    """
    records = open_records(spec, name, split)
    next(tfds_pairs(records, spec, languages, columns))
    return records


def identify_tfds(records: Any, split: str, columns: ColumnNames | None) -> str:
    """Digest what says that the records have changed."""
    return identify_records(records, split, ",".join(columns or ()))
