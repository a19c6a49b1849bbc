"""Captioned images from folders, tar archives and numpy archives."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.captions.caption_columns import CaptionColumns
from bilevel.data.captions.stream import Captioned
from bilevel.data.compression import PACKED_SUFFIXES
from bilevel.data.digests import digest
from bilevel.data.labelled.files import load_arrays
from bilevel.data.labelled.folders import IMAGE_SUFFIXES
from bilevel.data.notes import note, some
from bilevel.data.opening import Place, open_bytes, read_errors
from bilevel.data.streams import one_line
from bilevel.data.text.lines import json_object, lines_of
from bilevel.types import UserError

CAPTION_SUFFIXES = (".txt", ".caption")
SHARD_SUFFIXES = (".tar", ".tgz")
_IMAGES = ("image", "images", "x", "data")
_LABELS = ("label", "labels", "y", "target")
_CAPTIONS = ("caption", "captions", "text")
_AS_UTF8 = "convert it to UTF-8, for example with iconv"


class ImageFolder:
    """Images with captions in files of the same name (`a.jpg`, `a.txt`), or in folders called by their classes.

    Hidden entries do not count; what is neither an image nor a caption of one is named on stderr.

    Raises:
        UserError: there are no images, or the folder cannot be read.
    """

    def __init__(self, folder: Path, *, classes: bool):
        self.folder, self._classes = folder, classes
        self.images: list[Path] = []
        others: list[Path] = []
        for path in _files_below(folder):
            (self.images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
        if not self.images:
            raise UserError(
                f"The folder {folder} holds no images, tables or archives ({', '.join(IMAGE_SUFFIXES)}, .csv, .tsv, .jsonl, "
                ".parquet, .tar, .npz); check --data.generic and --data.specific."
            )
        stems = {path.with_suffix("") for path in self.images}
        captions = {path for path in others if path.suffix in CAPTION_SUFFIXES and path.with_suffix("") in stems}
        self.has_captions = bool(captions)
        self._captions = captions
        if unread := [str(path.relative_to(folder)) for path in others if path not in captions]:
            note(f"of the folder {folder} are not read: {some(unread)}; beside a.jpg its caption is called a.txt.")

    def read(self) -> Iterator[Captioned]:
        """Stream the images in the order of their paths; the class is the name of the folder, directly in this one."""
        for path in self.images:
            names = path.relative_to(self.folder).parts
            category = names[0] if self._classes and len(names) == 2 else ""
            yield Captioned(str(path), path, self._caption(path), category)

    def _caption(self, path: Path) -> str:
        for suffix in CAPTION_SUFFIXES:
            file = path.with_suffix(suffix)
            if file in self._captions:
                return caption_text(file.read_bytes(), str(file))
        return ""

    def identify(self) -> str:
        """Digest paths, sizes and times of all files."""
        files = [*self.images, *sorted(self._captions)]
        stats = [(path.relative_to(self.folder).as_posix(), path.stat()) for path in files]
        return digest(["folder", *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)])


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted by path; hidden ones and those in hidden folders do not count."""

    def refuse(error: OSError) -> None:
        raise error

    with read_errors(folder):
        for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def caption_text(content: bytes, where: str) -> str:
    """Return the text of a caption file in one line.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return one_line(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; {_AS_UTF8}.") from error


def shard_captions(path: Place, columns: CaptionColumns) -> Iterator[Captioned]:
    """Stream a tar archive as webdataset writes it: files of one sample follow each other and differ in their extension.

    The caption is in `KEY.txt` (or .caption), or in a field of `KEY.json` that --data.caption-column names (by default
    `caption`, if there is no text file); the class is in `KEY.cls`, or in a field that --data.class-column names.

    Raises:
        UserError: the archive is damaged, or a field is missing.
    """
    try:
        with read_errors(path), open_bytes(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            members = ((member, archive) for member in archive if member.isfile() and not _hidden(member.name))
            for key, group in itertools.groupby(members, key=lambda pair: _key(pair[0].name)):
                files = {_extension(member.name): _content(archive, member) for member, archive in group}
                yield _of_sample(files, f"{path}, {key}", columns)
    except tarfile.TarError as error:
        raise UserError(f"{path} cannot be read as a tar archive ({error}); write it again.") from error


def _hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _extension(name: str) -> str:
    return "." + PurePosixPath(name).name.partition(".")[2].lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _of_sample(files: dict[str, bytes], where: str, columns: CaptionColumns) -> Captioned:
    picture = next((files[suffix] for suffix in files if suffix in IMAGE_SUFFIXES), None)
    fields = json_object(files[".json"], f"{where}.json") if ".json" in files else {}
    text = next((caption_text(files[s], f"{where}{s}") for s in CAPTION_SUFFIXES if s in files), None)
    if columns.caption is not None or text is None:
        text = _field(fields, columns.caption, "caption", where)
    category = caption_text(files[".cls"], f"{where}.cls") if ".cls" in files else ""
    if columns.category:
        category = _field(fields, columns.category, "class", where)
    return Captioned(where, picture, text, "" if columns.category == "" else category)


def _field(fields: dict[str, Any], name: str | None, kind: str, where: str) -> str:
    value = fields.get(kind if name is None else name)
    if name is not None and name not in fields:
        raise UserError(
            f"{where}.json has no field {name!r}, but {some(list(fields)) or 'none at all'}; name that of the {kind} with "
            f"--data.{kind}-column."
        )
    if value is not None and not isinstance(value, str | int):
        raise UserError(
            f"{where}.json: {name or kind!r} holds a {type(value).__name__} instead of a text; name that of the {kind} with "
            f"--data.{kind}-column."
        )
    return "" if value is None else one_line(str(value))


def archive_captions(path: Path, columns: CaptionColumns) -> Iterator[Captioned]:
    """Stream the images of a .npz file: uint8 `[N, H, W]` or `[N, H, W, C]`, or JPEG files end to end (`jpeg`, `offsets`).

    Captions are an array of text, or the lines of `NAME.captions.txt` (or .gz) beside it; classes are an array `label` of
    whole numbers or text.

    Raises:
        UserError: there are no images, or neither captions nor classes, or their numbers differ.
    """
    arrays = load_arrays(path)
    pictures = _pictures(arrays, path, columns.image)
    captions = _captions(arrays, path, columns.caption)
    label = None if columns.category == "" else _named(arrays, columns.category, _LABELS, "class", path)
    if captions is None and label is None:
        raise UserError(
            f"{path} holds {', '.join(arrays)}, but neither captions nor classes; name an array of text with "
            f"--data.caption-column, or write a line for each image to {path.stem}.captions.txt."
        )
    categories = None if label is None else arrays[label]
    for found, what in ((captions, "captions"), (categories, "classes")):
        if found is not None and len(found) != len(pictures):
            raise UserError(f"{path} has {len(pictures)} images, but {len(found)} {what}; give as many of each.")
    for number in range(len(pictures)):
        caption = "" if captions is None else one_line(str(captions[number]))
        category = "" if categories is None else str(categories[number])
        yield Captioned(f"{path}, image {number}", pictures[number], caption, category)


def _pictures(arrays: dict[str, NDArray[Any]], path: Path, name: str | None) -> Any:
    if name is None and {"jpeg", "offsets"} <= arrays.keys():
        blob, ends = arrays["jpeg"], arrays["offsets"]
        if len(ends) < 2 or ends[-1] != len(blob) or (np.diff(ends) < 0).any():
            raise UserError(
                f"{path}: `offsets` must rise from 0 to the {len(blob)} bytes of `jpeg`; write the file again."
            )
        return [blob[start:end].tobytes() for start, end in itertools.pairwise(ends)]
    key = _named(arrays, name, _IMAGES, "image", path)
    if key is None:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; name the array of the images with --data.image-column."
        )
    images = arrays[key]
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4))
    ):
        raise UserError(
            f"{path}: {key} is {images.dtype}{list(images.shape)}; give images uint8 [rows, height, width], or with 1, 3 or 4 "
            "channels behind."
        )
    return images[..., None] if images.ndim == 3 else images


def _captions(arrays: dict[str, NDArray[Any]], path: Path, name: str | None) -> Any:
    key = _named(arrays, name, _CAPTIONS, "caption", path)
    if key is not None:
        if arrays[key].dtype.kind != "U":
            raise UserError(
                f"{path}: {key} holds {arrays[key].dtype} instead of text; name it with --data.caption-column."
            )
        return arrays[key]
    file = caption_file(path)
    return None if file is None else list(lines_of(file))


def caption_file(path: Path) -> Path | None:
    """Return the file with the captions of a .npz file, `NAME.captions.txt`, compressed or not; None if there is none."""
    names = [f"{path.stem}.captions.txt{end}" for end in ("", *PACKED_SUFFIXES)]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _named(arrays: Any, name: str | None, known: tuple[str, ...], kind: str, path: Path) -> str | None:
    if name is not None and name not in arrays:
        raise UserError(
            f"{path} has no array {name!r}, but {', '.join(arrays)}; name that of the {kind} with --data.{kind}-column."
        )
    return name or next((key for key in known if key in arrays), None)
