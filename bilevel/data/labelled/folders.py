"""Folders of images: `train/CLASS/*.png`, likewise test and perhaps valid."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from bilevel.data.digests import digest
from bilevel.data.labelled.decoding import decoded
from bilevel.data.labelled.images import Image, cached_images
from bilevel.data.labelled.parts import TEST, TRAIN, VALID, Part, Parts
from bilevel.data.notes import note, some
from bilevel.data.opening import entries_in, identity_of
from bilevel.types import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_READ = "an image folder holds PART/CLASS/IMAGE, with images called " + ", ".join(IMAGE_SUFFIXES)


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has a folder called train."""
    return folder.is_dir() and _part(folder, TRAIN) is not None


def image_folder(spec: str, folder: Path, size: int | None, cache_dir: Path) -> Parts:
    """Open a folder of images; the classes are the folders of train, sorted by name.

    What is not read is named on stderr.

    Raises:
        UserError: a class of train has no images, another part has another class, two names stand for one folder, or something
            cannot be read.
    """
    parts = [_part(folder, names) for names in (TRAIN, VALID, TEST)]
    _check_distinct([part for part in parts if part is not None])
    _note_unread(folder, [path for path in _entries(folder) if path not in parts])
    assert parts[0] is not None
    classes = [path.name for path in _folders(parts[0])]
    train, valid, test = (part and _image_part(spec, part, classes, size, cache_dir) for part in parts)
    assert train is not None
    return Parts(spec, train, valid, test, tuple(classes))


def _part(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = [path for path in _folders(folder) if path.name.lower() in names]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both the {names[0]} part; keep one of them.")
    return found[0] if found else None


def _image_part(spec: str, part: Path, classes: list[str], size: int | None, cache_dir: Path) -> Part:
    files: list[tuple[Path, int]] = []
    facts: list[str] = []
    folders = _folders(part)
    _check_distinct(folders)
    unread = [path for path in _entries(part) if path not in folders]
    empty = sorted(set(classes) - {folder.name for folder in folders})
    for folder in folders:
        if folder.name not in classes:
            raise UserError(f"{part} has a class {folder.name!r} that train has not; the classes there are {classes}.")
        label, before = classes.index(folder.name), len(files)
        for path in _entries(folder):
            status = path.stat()
            if path.suffix.lower() in IMAGE_SUFFIXES and stat.S_ISREG(status.st_mode):
                files.append((path, label))
                facts.append(f"{folder.name}/{path.name}:{status.st_size}:{status.st_mtime_ns}")
            else:
                unread.append(path)
        if len(files) == before:
            empty.append(folder.name)
    _note_unread(part, unread)
    if empty and part.name.lower() in TRAIN:
        raise UserError(f"{part} has no images of the class {empty[0]!r}; add some, or remove its folder ({_READ}).")
    if empty:
        note(f"{part} has no images of: {some(empty)}.")

    def read() -> Iterator[Image]:
        return (Image(str(file), decoded(file, str(file), size), label) for file, label in files)

    name = f"{spec} ({part.name})"
    return cached_images(name, digest(["image folder", part.name, size or 0, *classes, *facts]), read, cache_dir)


def _entries(folder: Path) -> list[Path]:
    return [path for path in entries_in(folder) if isinstance(path, Path)]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _check_distinct(folders: list[Path]) -> None:
    known: dict[object, Path] = {}
    for folder in folders:
        if (other := known.setdefault(identity_of(folder), folder)) is not folder:
            raise UserError(f"{other} and {folder} are one folder, by a link; remove the link.")


def _note_unread(folder: Path, paths: list[Path]) -> None:
    if paths:
        names = [str(path.relative_to(folder)) + ("/" if path.is_dir() else "") for path in paths]
        note(f"of {folder} are not read: {some(names)}; {_READ}.")
