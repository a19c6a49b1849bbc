"""Encoded images, decoded once into a memory-mapped array."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import digest
from bilevel.data.labelled.parts import Part, checked_part
from bilevel.data.text.writer import GrowingArray
from bilevel.types import UserError

_FORMAT_VERSION = 1
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
                        "give a size, to which all are resized."
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
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def decoded(data: Path | bytes, where: str, size: int | None) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file to RGB, uint8 `[H, W, 3]`.

    Raises:
        UserError: it is no image, or pillow is missing.
    """
    pillow = _pillow()
    try:
        with pillow.open(BytesIO(data) if isinstance(data, bytes) else data) as image:
            return np.asarray(_resized(image.convert("RGB"), size))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where} is not a sound image ({error}); replace it, or leave it out.") from error


def resized(pixels: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    """Resize uint8 `[H, W, C]` to `[size, size, C]`, C of 1 or 3: the shorter side is scaled, the longer one cut."""
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    image = _pillow().fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(_resized(image, size)).reshape(size, size, pixels.shape[-1])


def _resized(image: Any, size: int | None) -> Any:
    if size is None or image.size == (size, size):
        return image
    from PIL import Image as pillow
    from PIL import ImageOps

    return ImageOps.fit(image, (size, size), method=pillow.Resampling.BICUBIC)


def _pillow() -> Any:
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise UserError(
            f"Decoding images needs pillow, which cannot be imported ({error}); "
            "install it with: pip install 'bilevel[experiments]'"
        ) from error
    return pillow
