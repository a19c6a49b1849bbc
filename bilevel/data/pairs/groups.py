"""Which files a specification of pairs names, and which of them belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bilevel.data.compression import PACKED_SUFFIXES
from bilevel.data.notes import note, some
from bilevel.data.opening import (
    Place,
    entries_in,
    exists,
    has_magic,
    is_folder,
    is_plain_file,
    name_of,
    open_bytes,
    place_of,
    read_errors,
)
from bilevel.data.pairs.stream import Languages
from bilevel.data.text.files import expand
from bilevel.data.text.kinds import JSON_SUFFIXES, suffix_of
from bilevel.data.text.splits import named_part
from bilevel.types import UserError

_BRACES = re.compile(r"\{([^{}/]*)\}")
_OUTSIDE_BRACES = re.compile(r",(?![^{}]*\})")
_ONE_FILE = {".tsv": "tsv", ".parquet": "parquet", ".po": "catalogue", ".mo": "catalogue"} | dict.fromkeys(
    JSON_SUFFIXES, "json"
)
_MAY_BE_SIDES = (".tsv", ".po", ".mo")
_CODE = re.compile(r"(?:^|[._-])[a-z]{2,3}(?:[_-][A-Za-z]{2,4})?$")
_TWO_CODES = re.compile(r"(?:^|[._-])([a-z]{2,3})-([a-z]{2,3})$")
_KINDS = "two files, one for each language (train.en and train.cs), .tsv, .jsonl, .parquet, .po or .mo"


class _Name(NamedTuple):
    """What the name of a file says."""

    stem: str
    language: str | None
    """The source or target language, if the name ends with it: `train.en.gz`, `en.tsv`, `corpus_en.txt`."""


@dataclass(frozen=True)
class Group:
    """A file with pairs, or two files with a side each."""

    name: str
    """Of the file, without its suffixes and the language: `test_2016_flickr`."""
    kind: str
    """sides, tsv, json, parquet or catalogue."""
    paths: tuple[Place, ...]


def split_names(spec: str) -> list[str]:
    """Split a specification at the commas that are not in braces."""
    return [part.strip() for part in _OUTSIDE_BRACES.split(spec)]


def find_groups(spec: str, languages: Languages, *, only_train: bool = False) -> list[Group]:
    """Find the files that `spec` names (see `open_pairs`), in the order of the names.

    Args:
        spec: files, folders and patterns.
        languages: the two languages.
        only_train: of a folder in which some files are called train, take only those.

    Raises:
        UserError: something does not exist, or none of the files can be read as pairs.
    """
    groups: list[Group] = []
    named: list[Place] = []
    for name in split_names(spec):
        if _BRACES.search(name):
            groups.extend(_of_braces(name, languages))
        elif name and is_folder(place_of(name)):
            groups.extend(_of_folder(name, languages, only_train))
        elif has_magic(name) and not exists(place_of(name)):
            found = expand(name)
            groups.extend(_grouped(found, languages, name))
        else:
            named.extend(expand(name) if name else expand(spec))
    return groups + _grouped(named, languages, None)


def _of_braces(pattern: str, languages: Languages) -> list[Group]:
    """`train.{en,cs}.gz`, or `train.{}.gz` for any two languages."""
    inside = {code.strip() for braces in _BRACES.findall(pattern) for code in braces.split(",")} - {""}
    if inside and not set(languages) <= inside:
        raise UserError(
            f"{pattern} names {', '.join(sorted(inside))}, but the languages are {languages.source} and {languages.target}; "
            "choose them with --data.source-language and --data.target-language, or write {} for the language."
        )
    names = [_BRACES.sub(language, pattern) for language in languages]
    if has_magic(names[0]):
        return _grouped([place for name in names for place in expand(name)], languages, pattern)
    places = [place_of(name) for name in names]
    for name, place, language in zip(names, places, languages, strict=True):
        if not exists(place):
            raise UserError(
                f"The file {name} does not exist ({pattern}, {language}); check the path, --data.source-language and "
                "--data.target-language."
            )
    return [_sides(_parse(places[0], languages).stem, *places)]


def _of_folder(folder: str, languages: Languages, only_train: bool) -> list[Group]:
    files = [place for place in entries_in(place_of(folder)) if is_plain_file(place)]
    files = [place for place in files if not _parse(place, languages).stem.endswith((".labels", "_labels"))]
    if not files:
        raise UserError(f"The folder {folder} holds no files; give {_KINDS}.")
    groups = _grouped(files, languages, folder)
    train = [group for group in groups if named_part(group.name) == "train"]
    if only_train and train:
        if others := [name_of(group.paths[0]) for group in groups if group not in train]:
            note(f"of the folder {folder} only the files called train are generic data; not used: {some(others)}.")
        return train
    return groups


def _grouped(places: Sequence[Place], languages: Languages, pattern: str | None) -> list[Group]:
    """Put the two sides of a pair of files together.

    Args:
        places: the files.
        languages: the two languages.
        pattern: the folder or pattern that they were found by, which may also hold others; None if each was named.
    """
    names = {place: _parse(place, languages) for place in places}
    sides = _sides_of(names)
    ours = _of_these_languages(places, languages) if pattern else set(places)
    groups: list[Group] = []
    left_out: list[Place] = []
    for place, name in names.items():
        both = sides.get(_side_key(place, name.stem), {})
        if name.language and len(both) == 2:
            if name.language == languages.source:
                groups.append(_sides(name.stem, both[languages.source], both[languages.target]))
        elif pattern and len(sides.get(_side_key(place, _CODE.sub("", name.stem)), {})) == 2:
            left_out.append(place)  # the side of another language
        elif place in ours and (kind := _ONE_FILE.get(suffix_of(place)) or _kind_inside(place)):
            groups.append(Group(_without_suffixes(place), kind, (place,)))
        else:
            left_out.append(place)
    if left_out and (pattern is None or not groups):
        raise UserError(
            f"{pattern or left_out[0]} holds no pairs of {languages.source} and {languages.target}"
            + (
                f", but {some([name_of(place) for place in left_out])}"
                if pattern
                else " and no file is named as its other side"
            )
            + f"; give {_KINDS}, or choose other languages with --data.source-language and --data.target-language."
        )
    if left_out:
        names_left = some([name_of(place) for place in left_out])
        note(
            f"of {pattern} are not read, as they hold no pairs of {languages.source} and {languages.target}: {names_left}."
        )
    return groups


def _sides_of(names: dict[Place, _Name]) -> dict[tuple[str, str, str], dict[str, Place]]:
    """Collect the files that are called by one of the two languages, and may hold a side, by their name without it."""
    sides: dict[tuple[str, str, str], dict[str, Place]] = {}
    for place, name in names.items():
        suffix = suffix_of(place)
        if name.language and (suffix not in _ONE_FILE or suffix in _MAY_BE_SIDES):
            sides.setdefault(_side_key(place, name.stem), {})[name.language] = place
    return sides


def _side_key(place: Place, stem: str) -> tuple[str, str, str]:
    """Return what the two sides of a pair of files share: folder, name without the language, and kind."""
    suffix = suffix_of(place)
    return str(place)[: -len(name_of(place))], stem, suffix if suffix in _ONE_FILE else "text"


def _of_these_languages(places: Sequence[Place], languages: Languages) -> set[Place]:
    """Leave out files that are called by two other languages, such as `train.en-be.tsv`, if some are called by these."""
    codes = {place: _TWO_CODES.search(_without_suffixes(place)) for place in places}
    ours = {place for place, found in codes.items() if found and set(found.groups()) == set(languages)}
    return {place for place in places if not ours or not codes[place] or place in ours}


def _sides(stem: str, source: Place, target: Place) -> Group:
    return Group(stem or "pairs", "sides", (source, target))


def _parse(place: Place, languages: Languages) -> _Name:
    stem = _without_suffixes(place)
    tag = re.search(rf"(?:^|[._-])({'|'.join(map(re.escape, languages))})$", stem)
    return _Name(stem[: tag.start()], tag[1]) if tag else _Name(stem, None)


def _without_suffixes(place: Place) -> str:
    name = name_of(place)
    for suffix in (*PACKED_SUFFIXES, *_ONE_FILE, ".txt"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) and len(name) > len(suffix) else name
    return name


def _kind_inside(place: Place) -> str | None:
    """Tell a table or JSON lines under another name, such as `.txt`, by the first line."""
    with open_bytes(place) as file, read_errors(place):
        first = file.readline(1 << 16)
    if first.lstrip().startswith(b"{"):
        return "json"
    return "tsv" if b"\t" in first.strip() else None
