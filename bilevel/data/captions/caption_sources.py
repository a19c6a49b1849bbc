"""Opening captioned images: generic ones as a stream, specific ones in parts, with the captions of their classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bilevel.data.captions.caption_columns import TABLE_SUFFIXES, CaptionColumns, table_captions
from bilevel.data.captions.caption_files import (
    SHARD_SUFFIXES,
    ImageFolder,
    archive_captions,
    caption_file,
    shard_captions,
)
from bilevel.data.captions.caption_tfds import splits_of, tfds_captions
from bilevel.data.captions.classes import classes_of, with_class_captions
from bilevel.data.captions.glyphs import DIGIT_CAPTION, DIGITS, DIGITS_BY_CLASS, GLYPHS, digit_source, glyph_source
from bilevel.data.captions.stream import (
    Captioned,
    CaptionSource,
    category_names,
    joined_captions,
    parts_by_class,
    parts_of_captions,
)
from bilevel.data.digests import digest
from bilevel.data.notes import note, some
from bilevel.data.opening import Place, entries_in, exists, is_folder, name_of, place_of
from bilevel.data.text.files import expand, file_fingerprint
from bilevel.data.text.kinds import suffix_of
from bilevel.data.text.splits import PARTS, named_part
from bilevel.types import UserError

_NO_COLUMNS = CaptionColumns()
_ARCHIVE = (".npz",)
_KINDS = "a folder of images, a .csv, .tsv, .jsonl or .parquet file, a .tar or .npz archive, tfds:NAME, or " + GLYPHS
_TFDS_PARTS = {"train": "train", "valid": "validation", "test": "test"}


class CaptionParts(NamedTuple):
    """Specific images in disjoint parts."""

    train: CaptionSource
    """Weights are learned on these."""
    valid: CaptionSource
    """Choices are made on these."""
    test: Mapping[str, CaptionSource]
    """Reported only; by name."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty where the images have captions of their own."""
    class_captions: tuple[str, ...]
    """Likewise."""


def open_captions(
    spec: str = GLYPHS, *, columns: CaptionColumns = _NO_COLUMNS, template: str | None = None
) -> CaptionSource:
    """Open a stream of captioned images.

    Args:
        spec: one or several of these, separated by commas; files may be compressed, and may be URLs:
            - a table, .csv, .tsv, .jsonl (or .json, .ndjson) or .parquet, with a column of image paths (relative to the table)
              or, in Parquet, of encoded images, and one of captions. A list of captions gives a row for each;
            - a folder of images, each with its caption in a file beside it (`a.jpg`, `a.txt`), in folders of any depth; or a
              folder with such tables or archives. If some entries are called train, only these are read;
            - .tar archives as webdataset writes them, `KEY.jpg` and `KEY.txt` (or a field of `KEY.json`);
            - a .npz file with images uint8 `[N, H, W]` or `[N, H, W, C]` (or `jpeg` and `offsets`) and an array of captions, or
              with captions in the lines of `NAME.captions.txt` (or .gz) beside it;
            - `tfds:NAME[:SPLIT]`;
            - `matplotlib:glyphs`, from matplotlib's fonts; `sklearn:digits`.
        columns: names of columns, fields or arrays, where they are not the usual ones.
        template: caption the images by their classes instead, with {} for the name of the class.

    Returns:
        The images, not yet decoded.

    Raises:
        UserError: something is missing or of the wrong kind; the message names it and says what to do.
    """
    if template is None:
        if columns.category is None:
            columns = columns._replace(category="")
        return _opened(spec, columns)
    source = _opened(spec, columns)
    classes = classes_of(category_names(source), template, None, spec)
    return with_class_captions(source, classes, numbered=False)


def open_specific_captions(
    spec: str = DIGITS,
    *,
    columns: CaptionColumns = _NO_COLUMNS,
    template: str | None = None,
    class_captions: str | Path | None = None,
    per_class: tuple[int, int] | None = None,
) -> CaptionParts:
    """Open specific images in disjoint parts, train, valid and test.

    A folder whose entries are called train, valid (or validation, val, dev) and test gives those, as does a prefix DIR/NAME of
    files `NAME_train.npz` and so on; `tfds:NAME` gives train, validation and test if it has them. Everything else is split by a
    hash of the image's content: 80/10/10, or by class with `per_class`. `sklearn:digits` has 30 images of each class in train and
    50 in valid unless `per_class` says otherwise.

    Images have classes by their folders (`train/CLASS/a.png`), by a column or an array `class` or `label`, or by `KEY.cls`. Every
    image of a class has the caption of the class, whatever its own is.

    Args:
        spec: as for `open_captions`.
        columns: as for `open_captions`.
        template: caption of a class, with {} for its name; None: "a photo of a {}".
        class_captions: a file with the captions of the classes instead: a line `CLASS<TAB>CAPTION`, or
            `NUMBER<TAB>NAME<TAB>CAPTION`, for each class. The classes are then in its order, without those that train has not.
        per_class: images of each class in train and in valid; all others are test.

    Raises:
        UserError: a part is missing or empty, a class is not known, or as `open_captions`.
    """
    if template is not None and class_captions is not None:
        raise UserError("--data.template and --data.class-captions both caption the classes; give one of them.")
    named = _named_parts(spec, columns)
    if named and per_class is not None:
        raise UserError(f"{spec} has parts of its own; omit --data.specific-per-class.")
    if spec == DIGITS:
        per_class = per_class or DIGITS_BY_CLASS
        template = template if template or class_captions else DIGIT_CAPTION
    parts = named or _split(_opened(spec, columns), per_class)
    names = category_names(parts["train"])
    if not names and template is None and class_captions is None:
        return CaptionParts(parts["train"], parts["valid"], {"test": parts["test"]}, (), ())
    classes = classes_of(names, template, None if class_captions is None else place_of(class_captions), spec)
    parts = {part: with_class_captions(source, classes, numbered=True) for part, source in parts.items()}
    return CaptionParts(parts["train"], parts["valid"], {"test": parts["test"]}, classes.names, classes.captions)


def _split(source: CaptionSource, per_class: tuple[int, int] | None) -> dict[str, CaptionSource]:
    if per_class is not None:
        train, valid = per_class
        if min(per_class) < 1:
            raise UserError(f"--data.specific-per-class is {train} {valid}; both must be at least 1.")
        return parts_by_class(source, {"train": train, "valid": valid}, "test")
    parts = parts_of_captions(source)
    for part, found in parts.items():
        if next(found.read(), None) is None:
            raise UserError(
                f"{source.name} is too small to be split: no image fell in {part}; give more images, --data.specific-per-class, "
                "or a folder with train, valid and test."
            )
    return parts


def _named_parts(spec: str, columns: CaptionColumns) -> dict[str, CaptionSource] | None:
    if spec.startswith("tfds:"):
        if not set(_TFDS_PARTS.values()) <= splits_of(spec):
            return None
        parts = {part: tfds_captions(spec, columns, split) for part, split in _TFDS_PARTS.items()}
    else:
        found = _places_of_parts(spec)
        if found is None:
            return None
        parts = {part: joined_captions(spec, [_of_place(p, columns) for p in places]) for part, places in found.items()}
    return {part: dataclasses.replace(source, name=f"{spec} ({part})") for part, source in parts.items()}


def _places_of_parts(spec: str) -> dict[str, list[Place]] | None:
    """Return the entries of a folder, or the files that begin with a prefix, that are called train, valid and test."""
    place = place_of(spec)
    if is_folder(place):
        entries = [entry for entry in entries_in(place) if is_folder(entry) or _is_source(entry)]
        found = {part: [entry for entry in entries if named_part(name_of(entry)) == part] for part in PARTS}
    elif isinstance(place, Path) and not exists(place) and place.parent.is_dir():
        start = f"{place.name}_"
        files = [entry for entry in entries_in(place.parent) if _is_source(entry)]
        words = {file: _stem(file)[len(start) :] for file in files if name_of(file).startswith(start)}
        entries = [file for file, word in words.items() if word.isalpha()]
        found = {part: [entry for entry in entries if named_part(words[entry]) == part] for part in PARTS}
    else:
        return None
    if not any(found.values()):
        return None
    used = [entry for places in found.values() for entry in places]
    if missing := [part for part in PARTS if not found[part]]:
        raise UserError(
            f"{spec} has no images for {' and '.join(missing)}, but {some([name_of(entry) for entry in used])}; add what is "
            "called train, valid (or val, dev) and test, or give one folder or file, which is then split."
        )
    if unused := [name_of(entry) for entry in entries if entry not in used]:
        note(f"of {spec} only what is called train, valid and test is used; not used: {some(unused)}.")
    return found


def _stem(place: Place) -> str:
    """The name of a file without its suffix, and that of a compressed file."""
    name = name_of(place)
    return name[: name.lower().rindex(suffix_of(place))]


def _is_source(place: Place) -> bool:
    return suffix_of(place) in (*TABLE_SUFFIXES, *SHARD_SUFFIXES, *_ARCHIVE)


def _opened(spec: str, columns: CaptionColumns) -> CaptionSource:
    if not spec.strip():
        raise UserError(f"The data specification (--data.generic, --data.specific) is empty; give {_KINDS}.")
    names = [spec] if os.path.exists(os.path.expanduser(spec)) else [name.strip() for name in spec.split(",")]
    sources: list[CaptionSource] = []
    for name in names:
        if name == GLYPHS:
            sources.append(glyph_source())
        elif name == DIGITS:
            sources.append(digit_source())
        elif name.startswith("tfds:"):
            sources.append(tfds_captions(name, columns))
        elif name.startswith(("matplotlib:", "sklearn:", "python:")):
            raise UserError(f"{name!r} is not known; the sources of this kind are {GLYPHS} and {DIGITS}.")
        elif name and is_folder(place_of(name)):
            sources.append(_of_place(place_of(name), columns))
        else:
            sources.extend(_of_place(place, columns) for place in expand(name))
    return joined_captions(spec, sources)


def _of_place(place: Place, columns: CaptionColumns) -> CaptionSource:
    return _of_folder(place, columns) if is_folder(place) else _of_file(place, columns)


def _of_folder(folder: Place, columns: CaptionColumns) -> CaptionSource:
    """The shards, tables or archives directly in a folder, or else the images below it."""
    entries = [entry for entry in entries_in(folder) if not is_folder(entry)]
    for suffixes in (SHARD_SUFFIXES, TABLE_SUFFIXES, _ARCHIVE):
        files = [entry for entry in entries if suffix_of(entry) in suffixes]
        if not files:
            continue
        used = [file for file in files if named_part(name_of(file)) == "train"] or files
        if others := [name_of(entry) for entry in entries if entry not in used and _is_source(entry)]:
            note(f"of the folder {folder} are not read: {some(others)}.")
        return joined_captions(str(folder), [_of_file(file, columns) for file in used])
    if not isinstance(folder, Path):
        raise UserError(f"{folder} holds no tables or .tar archives; name some, or download the images.")
    return _of_images(folder, columns)


def _of_images(folder: Path, columns: CaptionColumns) -> CaptionSource:
    train = [e for e in entries_in(folder) if is_folder(e) and named_part(name_of(e)) == "train"]
    if train and isinstance(train[0], Path):
        others = [name_of(entry) for entry in entries_in(folder) if entry not in train]
        if others:
            note(f"of the folder {folder} only {name_of(train[0])} is read; not read: {some(others)}.")
        folder = train[0]
    images = ImageFolder(folder, classes=columns.category != "")
    if not images.has_captions and not any(item.category for item in images.read()):
        raise UserError(
            f"The images of {folder} have no captions: write that of a.jpg to a.txt, name a table with paths and captions, or "
            "put each in a folder called by its class and give --data.template."
        )
    return CaptionSource(str(folder), images.read, images.identify)


def _of_file(path: Place, columns: CaptionColumns) -> CaptionSource:
    suffix = suffix_of(path)
    beside: list[Place] = []
    read: Callable[[], Iterator[Captioned]]
    if suffix in TABLE_SUFFIXES:
        read = partial(table_captions, path, columns)
    elif suffix in SHARD_SUFFIXES:
        read = partial(shard_captions, path, columns)
    elif suffix in _ARCHIVE and isinstance(path, Path):
        read = partial(archive_captions, path, columns)
        beside = [file for file in [caption_file(path)] if file is not None]
    else:
        raise UserError(f"{path} is of no known kind; give {_KINDS} (--data.generic, --data.specific).")

    def identify() -> str:
        # Paths in a table are relative to its folder: the same table elsewhere names other images.
        where = os.path.abspath(path) if isinstance(path, Path) and suffix in TABLE_SUFFIXES else ""
        return digest([*(column or "" for column in columns), where, *map(file_fingerprint, [path, *beside])])

    return CaptionSource(str(path), read, identify)
