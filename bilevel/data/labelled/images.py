"""Encoded images, decoded once into a memory-mapped array."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import digest
from bilevel.data.labelled.parts import Part, checked_part
from bilevel.data.text.writer import GrowingArray
from bilevel.types import UserError

_FORMAT_VERSION = 2
_BLOCK = 256  # images written at once


class Image(NamedTuple):
    """One decoded image."""

    where: str
    """For messages."""
    pixels: NDArray[np.uint8]
    """uint8 `[H, W, C]`."""
    label: int


def cached_images(name: str, key: str, read: Callable[[], Iterator[Image]], cache_dir: Path) -> Part:
    """The images of one part of a source, from the cache; decoded into it the first time.

    The folder in the cache holds image.npy (uint8 `[N, H, W, C]`, memory-mapped), label.npy (int32 `[N]`) and
    manifest.json (source, rows, shape, content_hash, format_version).

    Args:
        name: of the source, for messages and the manifest.
        key: a digest of all that the images depend on.
        read: decodes the images, one after another.
        cache_dir: made if it does not exist.

    Raises:
        UserError: there are no images or they differ in shape, a label is negative, the cache cannot be written, or as `read`.
    """
    folder = cache_dir / f"images-{digest([_FORMAT_VERSION, key])}"
    found = cached_folder(
        folder, _opened, lambda temporary: _write(temporary, name, read()), work=f"Decoding the images of {name}"
    )
    return checked_part(found.inputs, found.labels, name)


def _write(folder: Path, name: str, images: Iterator[Image]) -> None:
    first = next(images, None)
    if first is None:
        raise UserError(f"{name} holds no images; give data that are not empty.")
    shape, hasher = first.pixels.shape, hashlib.blake2b(digest_size=16)
    labels: list[int] = []
    with contextlib.closing(GrowingArray(folder / "image.npy", np.uint8, shape)) as array:
        for block in _blocks(chain([first], images)):
            for image in block:
                if image.pixels.shape != shape:
                    raise UserError(
                        f"{image.where} has the shape {list(image.pixels.shape)}, but {first.where} {list(shape)}; "
                        "give a size (--data.size), to which all are resized."
                    )
            rows = np.stack([image.pixels for image in block])
            array.append(rows)
            hasher.update(rows.data)
            labels.extend(image.label for image in block)
    numbers = np.asarray(labels, np.int32)
    np.save(folder / "label.npy", numbers)
    hasher.update(numbers.data)
    manifest = {
        "format_version": _FORMAT_VERSION,
        "source": name,
        "rows": len(labels),
        "shape": list(shape),
        "content_hash": hasher.hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _blocks(images: Iterator[Image]) -> Iterator[list[Image]]:
    while block := list(islice(images, _BLOCK)):
        yield block


def _opened(folder: Path) -> Part:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        images = np.asarray(np.load(folder / "image.npy", mmap_mode="r", allow_pickle=False))
        labels = np.load(folder / "label.npy", allow_pickle=False)
        wanted = (manifest["rows"], *manifest["shape"])
        if images.shape != wanted or images.dtype != np.uint8 or labels.shape != wanted[:1]:
            raise ValueError(f"image.npy is {images.dtype}{list(images.shape)}, not uint8{list(wanted)}")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"The images in {folder} are damaged ({error}); remove the folder and try again.") from error
    return Part(images, labels)
