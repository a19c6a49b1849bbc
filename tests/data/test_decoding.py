"""Images as they are meant to be seen; what would be lost is refused."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.types import UserError

pytest.importorskip("PIL")
from PIL import Image

from bilevel.data.labelled.decoding import decoded

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Any, kind: str = "PNG", **options: Any) -> np.ndarray:
    return decoded(encoded(image, kind, **options), "a.png", None)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str):
    found = pixels(Image.fromarray(RAMP.astype(np.uint16) * 257), kind)
    np.testing.assert_array_equal(found, np.repeat(RAMP[..., None], 3, axis=2))


def test_sixteen_bits_with_a_transparent_value():
    found = pixels(Image.fromarray(RAMP.astype(np.uint16) * 257), transparency=257 * 40)
    assert found[RAMP == 40].tolist() == [[128, 128, 128]]
    assert found[RAMP == 44].tolist() == [[44, 44, 44]]


def test_numbers_of_unknown_range_are_refused():
    for values in (RAMP.astype(np.float32), RAMP.astype(np.int32) + 70_000):
        with pytest.raises(UserError, match=r"a\.png holds .* numbers, of a range that is not known"):
            pixels(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_drawings_on_transparent_ground_stay_visible(ink: int, mode: str):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:5, 2:5] = 255
    if mode == "P":
        image = Image.new("P", (8, 8))
        image.paste(1, (2, 2, 5, 5))
        image.putpalette([ink] * 6)
        found = pixels(image, transparency=b"\x00\xff")
    else:
        grey = Image.fromarray(np.full((8, 8), ink, np.uint8)).convert(mode)
        grey.putalpha(Image.fromarray(alpha))
        found = pixels(grey)
    np.testing.assert_array_equal(found[..., 0], np.where(alpha > 0, ink, 128))
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_opaque_alpha_changes_nothing():
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
    np.testing.assert_array_equal(pixels(Image.fromarray(rgb).convert("RGBA")), rgb)


def test_other_modes():
    rgb = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)
    np.testing.assert_array_equal(pixels(Image.fromarray(RAMP > 99))[..., 1], np.where(RAMP > 99, 255, 0))
    np.testing.assert_array_equal(pixels(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb)


def test_images_are_turned_as_their_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right
    found = pixels(Image.fromarray(np.repeat(RAMP[:4, :, None], 3, axis=2)), exif=exif)
    assert found.shape == (8, 4, 3)
    np.testing.assert_array_equal(found[..., 0], np.rot90(RAMP[:4], -1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind: str):
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP), Image.fromarray(RAMP.T)]
    with pytest.raises(UserError, match=r"a\.png holds 3 frames; give each as an image of its own"):
        pixels(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    pixels(frames[0], kind, lossless=True)


def test_an_image_that_is_too_large_is_named(monkeypatch: pytest.MonkeyPatch):
    data = encoded(Image.fromarray(RAMP))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert decoded(data, "b.png", 4).shape == (4, 4, 3)  # a warning of pillow's is not for users
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match=r"b\.png is too large an image .*; make it smaller"):
        decoded(data, "b.png", 4)


def test_what_is_no_sound_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for data, why in (
        (b"", "of no known kind"),
        (b"text", "of no known kind"),
        (encoded(Image.fromarray(RAMP))[:50], ".*"),
    ):
        with pytest.raises(UserError, match=rf"b\.png is not a sound image \({why}\); replace it") as caught:
            decoded(data, "b.png", None)
        assert "\n" not in str(caught.value)

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"The file .*c\.png cannot be read; change its permissions"):
        decoded(tmp_path / "c.png", "c.png", None)
