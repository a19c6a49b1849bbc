"""Opening sentence pairs: generic ones as a stream, specific ones in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from bilevel.data.digests import digest
from bilevel.data.notes import note, some
from bilevel.data.opening import is_folder, name_of, place_of
from bilevel.data.pairs.catalogues import catalogue_pairs
from bilevel.data.pairs.columns import (
    ColumnNames,
    identify_tfds,
    json_pairs,
    open_tfds,
    parquet_pairs,
    tfds_pairs,
    tsv_pairs,
)
from bilevel.data.pairs.embedded import NAMES, embedded_pairs, embedded_parts
from bilevel.data.pairs.groups import Group, find_groups, split_names
from bilevel.data.pairs.sides import pairs_of_sides
from bilevel.data.pairs.stream import Languages, Pair, PairSource, joined_pairs, parts_of_pairs
from bilevel.data.text.files import file_fingerprint
from bilevel.data.text.splits import PARTS, named_part
from bilevel.data.tfds import parse_spec
from bilevel.types import UserError

_SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
_TFDS_PARTS = {"train": "train", "valid": "validation", "test": "test"}


class PairParts(NamedTuple):
    """Specific pairs in disjoint parts."""

    train: PairSource
    """Weights are learned on these."""
    valid: PairSource
    """Choices are made on these."""
    test: Mapping[str, PairSource]
    """Reported only; by the names of the files, or "test"."""


def open_pairs(
    spec: str, *, source_language: str = "en", target_language: str = "fr", columns: ColumnNames | None = None
) -> PairSource:
    """Open a stream of sentence pairs.

    Args:
        spec: one or several of these, separated by commas; files may be compressed, and may be URLs:
            - two files with a line for each sentence, called by their languages: `train.{en,cs}.gz`, `train.{}.gz` (whatever
              the languages are), `train.en.gz,train.cs.gz`, or a pattern or folder in which they are. Two .tsv files
              (`id<TAB>text`), and two catalogues, are joined by the id;
            - a .tsv file, whose first line may name the columns by their languages; without such a line the first two
              columns are source and target;
            - a .jsonl (or .json, .ndjson) or .parquet file with a field for each language, or both in one called
              `translation`;
            - a gettext catalogue, .po or .mo, whose messages are in the source language;
            - a folder with any of these. If some are called train, only those are read;
            - `tfds:NAME[:SPLIT]`, with the feature Translation or TranslationVariableLanguages;
            - `python:catalogues` and `python:interface`, from packages of the extra `translation`.
        source_language: as the files call it.
        target_language: likewise.
        columns: names of the source and the target column, where they are not called by the languages (or source and
            target).

    Returns:
        The pairs. Where a table has no translation, the target is empty; packing drops and counts these.

    Raises:
        UserError: something is missing or of the wrong kind; the message names it and says what to do.
    """
    languages = _checked(spec, source_language, target_language)
    names = split_names(spec)
    if len(names) > 1 and any(name.startswith(("python:", "tfds:")) for name in names):
        options = {"source_language": source_language, "target_language": target_language, "columns": columns}
        return joined_pairs(spec, [open_pairs(name, **options) for name in names])
    if spec.startswith("python:"):
        return embedded_pairs(spec, languages)
    if spec.startswith("tfds:"):
        return _tfds(spec, languages, columns)
    groups = find_groups(spec, languages, only_train=True)
    return _source(spec, groups, languages, columns)


def open_specific_pairs(
    spec: str, *, source_language: str = "en", target_language: str = "fr", columns: ColumnNames | None = None
) -> PairParts:
    """Open specific pairs in disjoint parts: train, valid, and one or several test sets.

    A folder whose files are called train, valid (or validation, val, dev) and test gives those, and so do a pattern or a list of
    files if all three are there; a name may go on behind the word, but not with a letter. Each test file is a set of its own:
    `test_2016_flickr.en` and `.cs` are the set "test_2016_flickr". `tfds:NAME` without a split gives train, validation and test
    if it has them; `python:interface` has parts of its own. Everything else is split 80/10/10 by a hash of the source
    sentence, so that a sentence with several translations falls in one part.

    Args:
        spec: as for `open_pairs`.
        source_language: as for `open_pairs`.
        target_language: as for `open_pairs`.
        columns: as for `open_pairs`.

    Raises:
        UserError: a part is missing or empty, or as `open_pairs`.
    """
    languages = _checked(spec, source_language, target_language)
    if spec == "python:interface":
        return PairParts(*_three(embedded_parts(languages)))
    if spec.startswith("tfds:") and (parts := _tfds_parts(spec, languages, columns)):
        return PairParts(*_three(parts))
    if not spec.startswith(("tfds:", "python:")):
        found: dict[str, list[Group]] = {part: [] for part in PARTS}
        unused: list[str] = []
        groups = find_groups(spec, languages)
        for group in groups:
            part = named_part(group.name)
            found[part].append(group) if part else unused.append(name_of(group.paths[0]))
        if all(found.values()) or (is_folder(place_of(spec)) and any(found.values())):
            return _named_parts(spec, found, unused, languages, columns)
    whole = open_pairs(spec, source_language=source_language, target_language=target_language, columns=columns)
    parts = parts_of_pairs(whole, _SHARES)
    for part, source in parts.items():
        if not any(pair.source and pair.target for pair in source.read()):
            raise UserError(
                f"{spec} is too small to be split: no pair fell in {part}; give more pairs, or a folder with files called train, "
                "valid and test."
            )
    return PairParts(*_three(parts))


def _checked(spec: str, source_language: str, target_language: str) -> Languages:
    if not spec.strip():
        raise UserError("The data specification is empty; give files, a folder, tfds:NAME or python:catalogues.")
    if source_language == target_language:
        raise UserError(
            f"Source and target language are both {source_language!r}; choose two with --data.source-language and "
            "--data.target-language."
        )
    if spec.startswith("python:") and not set(split_names(spec)[:1]) <= set(NAMES):
        raise UserError(f"{spec!r} is not known; the sources of this kind are {' and '.join(NAMES)}.")
    return Languages(source_language, target_language)


def _three(parts: Mapping[str, PairSource]) -> tuple[PairSource, PairSource, dict[str, PairSource]]:
    return parts["train"], parts["valid"], {"test": parts["test"]}


def _named_parts(
    spec: str, found: dict[str, list[Group]], unused: list[str], languages: Languages, columns: ColumnNames | None
) -> PairParts:
    if missing := [part for part in PARTS if not found[part]]:
        names = ", ".join(name_of(path) for groups in found.values() for group in groups for path in group.paths)
        raise UserError(
            f"The folder {spec} holds no pairs of {languages.source} and {languages.target} for {' and '.join(missing)} (it "
            f"holds {names}); add files called train, valid (or val, dev) and test, or give one file, which is then split."
        )
    if unused:
        note(f"of {spec} only the files called train, valid and test are used; not used: {some(unused)}.")
    tests = {group.name: _source(f"{spec} ({group.name})", [group], languages, columns) for group in found["test"]}
    return PairParts(
        _source(f"{spec} (train)", found["train"], languages, columns),
        _source(f"{spec} (valid)", found["valid"], languages, columns),
        tests if len(tests) > 1 else {"test": next(iter(tests.values()))},
    )


def _source(name: str, groups: list[Group], languages: Languages, columns: ColumnNames | None) -> PairSource:
    return joined_pairs(name, [_of_group(name, group, languages, columns) for group in groups])


def _of_group(name: str, group: Group, languages: Languages, columns: ColumnNames | None) -> PairSource:
    readers: dict[str, Callable[[], Iterator[Pair]]] = {
        "sides": lambda: pairs_of_sides(*group.paths),
        "tsv": lambda: tsv_pairs(group.paths[0], languages, columns),
        "json": lambda: json_pairs(group.paths[0], languages, columns),
        "parquet": lambda: parquet_pairs(group.paths[0], languages, columns),
        "catalogue": lambda: catalogue_pairs(group.paths[0], languages),
    }

    def identify() -> str:
        return digest([group.kind, *(columns or ()), *map(file_fingerprint, group.paths)])

    return PairSource(name, languages, readers[group.kind], identify)


def _tfds(spec: str, languages: Languages, columns: ColumnNames | None, split: str | None = None) -> PairSource:
    name, named, field = parse_spec(spec)
    if field is not None:
        raise UserError(
            f"{spec}: pairs have two fields; write tfds:NAME:SPLIT, and name the fields with --data.columns."
        )
    split = split or named
    records = open_tfds(spec, name, split, languages, columns)
    return PairSource(
        spec,
        languages,
        lambda: tfds_pairs(records, spec, languages, columns),
        lambda: identify_tfds(records, split, columns),
    )


def _tfds_parts(spec: str, languages: Languages, columns: ColumnNames | None) -> dict[str, PairSource] | None:
    name, _, _ = parse_spec(spec)
    if spec != f"tfds:{name}":
        return None
    train = open_tfds(spec, name, "train", languages, columns)
    if not set(_TFDS_PARTS.values()) <= set(train.dataset_info.splits):
        return None
    parts = {part: _tfds(spec, languages, columns, split) for part, split in _TFDS_PARTS.items()}
    return {
        part: PairSource(f"{spec} ({part})", languages, source.read, source.identify) for part, source in parts.items()
    }
