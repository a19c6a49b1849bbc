"""Labelled rows in files: numpy archives, archives of JPEG images, and tables."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.labelled.decoding import decoded
from bilevel.data.labelled.folders import image_folder, is_image_folder
from bilevel.data.labelled.images import Image, cached_images
from bilevel.data.labelled.parts import (
    TEST,
    TRAIN,
    VALID,
    Part,
    Parts,
    checked_part,
    class_names,
    numbered,
    whole_labels,
)
from bilevel.data.labelled.tables import SUFFIXES, Columns, table_arrays
from bilevel.data.notes import note, some
from bilevel.data.opening import Place, name_of, place_of, read_errors
from bilevel.data.text.files import file_fingerprint
from bilevel.types import UserError

_INPUTS = ("image", "images", "features", "x", "data")
_LABELS = ("label", "labels", "y", "target")
_ENDS = (".npz", "_jpeg.npz", *SUFFIXES)
_FORMS = (
    "a .npz, .csv or .parquet file, a folder with train.npz and test.npz, a prefix such as DIR/cifar10 of files "
    "cifar10_train.npz and cifar10_test.npz, or a folder with train/CLASS/*.png and test/CLASS/*.png"
)


class _Raw(NamedTuple):
    """Arrays of the user, as they were found."""

    inputs: NDArray[Any]
    labels: NDArray[Any]
    where: str
    """For messages."""
    columns: Columns | None = None
    """Of a table."""


class _Reading(NamedTuple):
    """How files are read."""

    size: int | None
    cache_dir: Path
    label: str | None
    """Name of the labels; None: one of `_LABELS`."""


def file_parts(spec: str, size: int | None, cache_dir: Path, label: str | None = None) -> Parts:
    """Open labelled files; see `open_labelled`.

    Raises:
        UserError: nothing is there, or it is of another kind; the message names it.
    """
    path, how = place_of(spec), _Reading(size, cache_dir, label)
    if isinstance(path, str):
        if not name_of(path).lower().endswith(SUFFIXES):
            raise UserError(f"{spec} is not a .csv or .parquet file; download the data, and give {_FORMS}.")
        return _assembled(spec, [_table_part(path, how), None, None])
    with read_errors(path):
        return _local_parts(spec, path, how)


def _local_parts(spec: str, path: Path, how: _Reading) -> Parts:
    if path.is_file():
        return _assembled(spec, _one_file(spec, path, how))
    if is_image_folder(path):
        if how.label is not None:
            raise UserError(
                f"{spec} is a folder of images, labelled by their folders; leave label={how.label!r} (--data.label) out."
            )
        return image_folder(spec, path, how.size, how.cache_dir)
    prefix = _prefix(spec, path)
    files = [_part_file(prefix, names) for names in (TRAIN, VALID, TEST)]
    if files[0] is None:
        raise UserError(
            f"There are no labelled data at {spec} (--data.source, taken relative to {Path.cwd()}); give {_FORMS}."
        )
    _note_unused(prefix, files)
    train = _file_part(files[0], how)
    columns = train.columns if isinstance(train, _Raw) else None
    return _assembled(spec, [train, *(file and _file_part(file, how, columns) for file in files[1:])])


def _assembled(spec: str, found: list[Part | _Raw | None]) -> Parts:
    """Checks train, valid and test; where labels are names, those of train number the classes."""
    first = found[0]
    names = class_names(first.labels) if isinstance(first, _Raw) else ()

    def checked(part: Part | _Raw | None) -> Part | None:
        if not isinstance(part, _Raw):
            return part
        return checked_part(part.inputs, numbered(part.labels, names, part.where), part.where)

    train, valid, test = map(checked, found)
    assert train is not None
    return Parts(spec, train, valid, test, names)


def _prefix(spec: str, path: Path) -> str:
    """What the names of the files begin with: `path` itself, or the only such beginning in the folder `path`."""
    if not path.is_dir():
        return f"{path}_"
    if _part_file(f"{path}{os.sep}", TRAIN) is not None:
        return f"{path}{os.sep}"
    ends = [f"_train{end}" for end in _ENDS]
    names = [file.name for file in path.iterdir()]
    sets = sorted({name[: -len(end)] for name in names for end in ends if name.lower().endswith(end)})
    if len(sets) != 1:
        found = f"holds several data sets ({', '.join(sets)})" if sets else "holds no labelled data"
        advice = f"name one, such as {path / sets[0]}" if sets else f"give {_FORMS}"
        raise UserError(f"The folder {spec} {found}; {advice}.")
    return f"{path / sets[0]}_"


def _part_file(prefix: str, names: tuple[str, ...]) -> Path | None:
    found = [file for file in _beginning(prefix) if _rest(file, prefix) in {n + end for n in names for end in _ENDS}]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both the {names[0]} part; keep one of them.")
    return found[0] if found else None


def _beginning(prefix: str) -> list[Path]:
    """The files whose paths begin so; hidden ones do not count."""
    folder, start = os.path.split(prefix)
    if not os.path.isdir(folder or "."):
        return []
    found = (path for path in Path(folder or ".").iterdir() if path.name.startswith(start) and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def _rest(file: Path, prefix: str) -> str:
    """The name of a file behind the prefix, in lower case."""
    return file.name[len(os.path.split(prefix)[1]) :].lower()


def _note_unused(prefix: str, files: list[Path | None]) -> None:
    others = [file.name for file in _beginning(prefix) if file not in files and file.name.lower().endswith(_ENDS)]
    if others:
        note(f"beside {', '.join(str(file) for file in files if file)} are not used: {some(others)}.")


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a .npz file.

    Raises:
        UserError: it is no such file, or damaged.
    """
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is not an archive of arrays")
        with stored:
            return {key: stored[key] for key in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npz file ({error}); write it again with numpy.savez.") from error


def _names(path: Path) -> set[str]:
    """The arrays of a file, by their names alone."""
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npz file ({error}); write it again with numpy.savez.") from error


def _one_file(spec: str, path: Path, how: _Reading) -> list[Part | _Raw | None]:
    """A table, or an archive with x_train, y_train, x_test, y_test (and x_valid, y_valid), or the rows of all parts together."""
    if not path.name.lower().endswith(_ENDS):
        raise UserError(f"{spec} is not a .npz, .csv or .parquet file; give {_FORMS}.")
    if path.suffix.lower() != ".npz" or "x_train" not in _names(path):
        return [_file_part(path, how), None, None]
    arrays = load_arrays(path)
    found: list[Part | _Raw | None] = []
    used: list[str] = []
    for names in (TRAIN, VALID, TEST):
        name, *more = [name for name in names if f"x_{name}" in arrays] or [None]
        if more:
            raise UserError(f"{path} holds x_{name} and x_{more[0]}, which are one part; leave one of them out.")
        if name is not None and f"y_{name}" not in arrays:
            raise UserError(f"{path} holds x_{name} but no y_{name}; add the labels.")
        found.append(None if name is None else _Raw(arrays[f"x_{name}"], arrays[f"y_{name}"], f"{path}, {name}"))
        used += [f"x_{name}", f"y_{name}"]
    _note_arrays(path, arrays, used)
    if how.label is not None:
        raise UserError(
            f"{path} holds x_train, whose labels are y_train; leave label={how.label!r} (--data.label) out."
        )
    _refuse_size(path, how.size)
    return found


def _note_arrays(path: Path, arrays: Iterable[str], used: Collection[str]) -> None:
    if unused := [name for name in arrays if name not in used]:
        note(f"of the arrays of {path} are not used: {some(unused)}.")


def _file_part(path: Path, how: _Reading, columns: Columns | None = None) -> Part | _Raw:
    """The rows of one file with inputs and labels, or with JPEG images end to end; a table has the columns of train."""
    if path.suffix.lower() != ".npz":
        return _table_part(path, how, columns)
    known = _LABELS if how.label is None else (how.label,)
    if {"jpeg", "offsets"} <= _names(path):
        key = digest(["jpeg archive", file_fingerprint(path), how.size or 0, *([how.label] if how.label else [])])
        return cached_images(str(path), key, lambda: _jpeg_images(path, how.size, known), how.cache_dir)
    arrays = load_arrays(path)
    labels = next((name for name in known if name in arrays), None)
    inputs = next((name for name in _INPUTS if name in arrays and name != labels), None)
    if inputs is None or labels is None:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; name the inputs one of {', '.join(_INPUTS)} "
            f"and the labels one of {', '.join(known)}."
        )
    _refuse_size(path, how.size)
    _note_arrays(path, arrays, (inputs, labels))
    return _Raw(arrays[inputs], arrays[labels], str(path))


def _table_part(path: Place, how: _Reading, columns: Columns | None = None) -> _Raw:
    _refuse_size(path, how.size)
    table = table_arrays(path, how.label, _LABELS, columns)
    return _Raw(table.features, table.labels, str(path), table.columns)


def _refuse_size(path: Place, size: int | None) -> None:
    if size is not None:
        raise UserError(f"{path} holds arrays, which are not resized; leave size={size} (--data.size) out.")


def _jpeg_images(path: Path, size: int | None, known: tuple[str, ...]) -> Iterator[Image]:
    arrays = load_arrays(path)
    blob, offsets = arrays["jpeg"], arrays["offsets"]
    name = next((name for name in known if name in arrays), None)
    if name is None:
        raise UserError(f"{path} holds {', '.join(arrays)}; name the labels one of {', '.join(known)}.")
    if arrays[name].dtype.kind == "U":
        raise UserError(f"{path}: {name} holds text; beside JPEG files, number the classes from 0.")
    labels = whole_labels(arrays[name], str(path))
    if len(offsets) != len(labels) + 1 or offsets[-1] != len(blob) or (np.diff(offsets) < 0).any():
        raise UserError(
            f"{path}: `offsets` must rise from 0 to the {len(blob)} bytes of `jpeg`, one more than there are labels; "
            "write the file again."
        )
    for i, label in enumerate(labels):
        where = f"{path}, image {i}"
        yield Image(where, decoded(blob[offsets[i] : offsets[i + 1]].tobytes(), where, size), int(label))
