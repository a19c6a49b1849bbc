"""Captioned images without a download: glyphs with their Unicode names, and handwritten digits.

`matplotlib:glyphs` is every visible glyph of the fonts that come with matplotlib, white on black, 28 pixels to the em, in the
middle of 32 × 32 pixels (larger ones are made smaller), with the Unicode name of its character in lower case as caption: the same
characters in several styles, and each picture with a caption once. The placeholders of the font Last Resort do not count. The
domains are digits (western ones, whatever their style) and, of all others, letters, marks, numbers, punctuation and symbols. The
Computer Modern fonts have their glyphs in TeX's order, which is not that of Unicode: where the glyph's own name says another
character, the caption is wrong.

`sklearn:digits` is the 1,797 handwritten digits of scikit-learn, captioned "digit five": 30 images of each class in train, 50 in
valid, all others in test.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.captions.stream import Captioned, CaptionSource, picture_bytes
from bilevel.data.digests import digest
from bilevel.data.labelled.packages import sklearn_parts
from bilevel.data.streams import NO_FAULT
from bilevel.types import UserError

GLYPHS, DIGITS = "matplotlib:glyphs", "sklearn:digits"
DIGITS_BY_CLASS = (30, 50)
"""Images of each class in train and valid: those of ATD, section 5.4."""
DIGIT_CAPTION = "digit {}"
_NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIDE, _EM = 32, 28
_OF_TEX = "cm"
_PLACEHOLDERS = "LastResort"
_KINDS = {"L": "letters", "M": "marks", "N": "numbers", "P": "punctuation"}
WRONG_CAPTION = "wrong caption"
_WESTERN = tuple("0123456789")


def glyph_source() -> CaptionSource:
    """Open `matplotlib:glyphs`, labelled by domain and fault.

    Raises:
        UserError: matplotlib or pillow is missing.
    """
    folder = _font_folder()
    fonts = sorted(path for path in folder.glob("*.ttf") if not path.name.startswith(_PLACEHOLDERS))

    def read() -> Iterator[Captioned]:
        seen: set[bytes] = set()
        for item in (item for font in fonts for item in _glyphs_of(font)):
            assert item.picture is not None
            key = blake2b(picture_bytes(item.picture) + item.caption.encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                yield item

    def identify() -> str:
        sizes = (f"{font.name} {font.stat().st_size}" for font in fonts)
        return digest([GLYPHS, _EM, version("pillow"), unicodedata.unidata_version, *sizes])

    return CaptionSource(GLYPHS, read, identify, ("domain", "fault"))


def digit_source() -> CaptionSource:
    """Open `sklearn:digits`, all of them.

    Raises:
        UserError: scikit-learn is missing.
    """
    images, labels = sklearn_parts(DIGITS).train

    def read() -> Iterator[Captioned]:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = _NUMERALS[label]
            yield Captioned(f"{DIGITS}, image {number}", image, DIGIT_CAPTION.format(name), name)

    return CaptionSource(DIGITS, read, lambda: digest([DIGITS, images.tobytes()]), (), _NUMERALS)


def _font_folder() -> Path:
    try:
        import matplotlib
        import PIL.ImageFont as _  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{GLYPHS} needs matplotlib and pillow ({error}): run `pip install 'bilevel[experiments]'`, or name "
            "images of your own with --data.generic and --data.specific."
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _glyphs_of(path: Path) -> Iterator[Captioned]:
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    for code, index in sorted(font.get_charmap().items()):
        character = chr(code)
        name = unicodedata.name(character, "").lower()
        if name and (image := _drawn(path, character)) is not None:
            drawn = _of_name(font.get_glyph_name(index)) if path.name.startswith(_OF_TEX) else character
            labels = (_domain(drawn), NO_FAULT if drawn == character else WRONG_CAPTION)
            yield Captioned(f"{path.name}, {name}", image, name, labels=labels)


def _of_name(glyph: str) -> str:
    """Return the character that a glyph's name says; `""` if it says none."""
    from fontTools.agl import toUnicode

    return toUnicode(glyph.removesuffix("oldstyle"))


def _domain(character: str) -> str:
    if unicodedata.normalize("NFKC", character) in _WESTERN:
        return "digits"
    return _KINDS.get(unicodedata.category(character)[0], "symbols") if len(character) == 1 else "symbols"


def _drawn(path: Path, character: str) -> NDArray[np.uint8] | None:
    """Draw a glyph, uint8 `[32, 32, 1]`; None if it is blank."""
    ink = _ink(_font(path, _EM), character)
    if ink is None:
        return None
    if max(ink.shape) > _SIDE:
        smaller = _ink(_font(path, max(1, _EM * _SIDE // (max(ink.shape) + 1))), character)
        ink = ink if smaller is None else smaller
    height, width = ink.shape
    image = np.zeros((_SIDE, _SIDE, 1), np.uint8)
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    image[top : top + height, left : left + width, 0] = ink
    return image


@functools.lru_cache(maxsize=256)
def _font(path: Path, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _ink(font: Any, character: str) -> NDArray[np.uint8] | None:
    """The pixels of a glyph, cut to what is drawn; None if nothing is."""
    mask = font.getmask(character)
    box = mask.getbbox() if all(mask.size) else None
    if box is None:
        return None
    pixels = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
    return pixels[box[1] : box[3], box[0] : box[2]]
