"""Tiny captioned images, written by pillow."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.data import CaptionSource


def pixels(number: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(number: int, **shape: int) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels(number, **shape)).save(file, "PNG")
    return file.getvalue()


def write_png(path: Path, number: int, **shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number, **shape))
    return path


def read(source: CaptionSource) -> list[tuple[Any, ...]]:
    """Return image, caption, class and label of each item; pixels as their first value, files as what is in them."""
    return [(_content(item.picture), item.caption, item.category, item.label) for item in source.read()]


def _content(picture: Any) -> Any:
    if isinstance(picture, Path):
        return picture.read_bytes() if picture.exists() else picture.name
    return picture.tolist() if isinstance(picture, np.ndarray) else picture
