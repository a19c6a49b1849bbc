"""Encoded images as RGB pixels of 8 bits; what would be lost on the way is refused."""

from __future__ import annotations

import contextlib
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.opening import read_errors
from bilevel.types import UserError

_GROUND = 128
"""Grey below what is transparent: drawings in black and in white both stay visible."""
_DEPTH = 2**16 - 1
_ORIENTATION = 0x0112


class ImageError(UserError):
    """An image that cannot be used, whatever the reader does."""


def decoded(data: Path | bytes, where: str, size: int | None) -> NDArray[np.uint8]:
    """Decode an image to RGB, uint8 `[H, W, 3]`, as it is meant to be seen.

    It is turned as its EXIF data say, 16 bits of grey are scaled to 8, and what is transparent is laid on grey.

    Args:
        data: a file, or its content.
        where: for messages.
        size: height and width to resize to, or None.

    Raises:
        ImageError: it is no image, is too large, has several frames or numbers of unknown range.
        UserError: the file cannot be read, or pillow is missing.
    """
    pillow = _pillow()
    with read_errors(data) if isinstance(data, Path) else contextlib.nullcontext():
        content = BytesIO(data if isinstance(data, bytes) else data.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            with pillow.open(content) as image:
                return np.asarray(_fitted(_rgb(image, where), size))
    except UserError:
        raise
    except pillow.DecompressionBombError as error:
        raise ImageError(f"{where} is too large an image ({error}); make it smaller, or leave it out.") from error
    except Exception as error:  # each decoder has exceptions of its own
        found = "of no known kind" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise ImageError(f"{where} is not a sound image ({found}); replace it, or leave it out.") from error


def resized(pixels: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    """Resize uint8 `[H, W, C]` to `[size, size, C]`, C of 1, 3 or 4: the shorter side is scaled, the longer one cut."""
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    image = _pillow().fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(_fitted(image, size)).reshape(size, size, pixels.shape[-1])


def _rgb(image: Any, where: str) -> Any:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with a preview behind it
        raise ImageError(f"{where} holds {frames} frames; give each as an image of its own, or leave it out.")
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _of_eight_bits(image, where)
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.convert("RGB")
    drawn = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    ground = _pillow().new("RGBA", drawn.size, (_GROUND, _GROUND, _GROUND, 255))
    ground.alpha_composite(drawn)
    return ground.convert("RGB")


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # damaged EXIF data do not say how to turn it
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _of_eight_bits(image: Any, where: str) -> Any:
    """Scale grey values of 16 bits to 8."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > _DEPTH:
        raise ImageError(
            f"{where} holds {values.dtype} numbers, of a range that is not known; save it with 8 or 16 bits."
        )
    grey = (values.astype(np.int64) * 255 + _DEPTH // 2) // _DEPTH
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], _GROUND, grey)
    return _pillow().fromarray(grey.astype(np.uint8))


def _fitted(image: Any, size: int | None) -> Any:
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
