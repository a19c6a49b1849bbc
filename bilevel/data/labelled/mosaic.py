"""Images side by side, each below its label, as an SVG file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 12
_BESIDE = 3
"""Columns of images that have captions beside them."""


def mosaic(images: NDArray[np.uint8], labels: Sequence[str], marked: NDArray[np.bool_]) -> str:
    """Draw images.

    Args:
      images: uint8 `[n, H, W, C]`.
      labels: of the images.
      marked: bool `[n]`: whose label is red.

    Returns:
      The text of an SVG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    height, width = images.shape[1:3]
    line = max(2, height // 4)  # pixels of a label's line
    lines = -(-len(images) // COLUMNS)
    canvas = np.full((lines * (height + line), COLUMNS * (width + 1), 3), 255, np.uint8)
    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        panel: Any = figure.add_subplot()
        panel.axis("off")
        for i, image in enumerate(images):
            top, left = i // COLUMNS * (height + line) + line, i % COLUMNS * (width + 1)
            canvas[top : top + height, left : left + width] = _colours(image)
            color = "red" if marked[i] else "black"
            panel.text(left + width / 2, top - 1, labels[i], fontsize=7, color=color, ha="center", va="bottom")
        panel.imshow(canvas, interpolation="nearest")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def captioned(images: NDArray[np.uint8], captions: Sequence[str], marked: NDArray[np.bool_]) -> str:
    """Draw images, each beside its caption.

    Args:
      images: uint8 `[n, H, W, C]`.
      captions: of the images; long ones are cut.
      marked: bool `[n]`: whose caption is red.

    Returns:
      The text of an SVG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = -(-len(images) // _BESIDE)
    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 0.55 * lines + 0.1))
        for i, image in enumerate(images):
            left, bottom = i % _BESIDE / _BESIDE, 1 - (i // _BESIDE + 1) / lines
            panel: Any = figure.add_axes((left, bottom, 0.055, 0.9 / lines))
            panel.axis("off")
            panel.imshow(_colours(image), interpolation="nearest")
            said = textwrap.fill(captions[i], 40, max_lines=3, placeholder=" …")
            panel.text(
                1.15, 0.5, said, fontsize=7, color="red" if marked[i] else "black", va="center",
                transform=panel.transAxes, parse_math=False,
            )  # fmt: skip
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _colours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image `[H, W, C]` as it can be shown, `[H, W, 3]`: of 3 or 4 channels the first 3, of others the mean as grey."""
    if image.shape[-1] in (3, 4):
        return image[..., :3]
    return np.repeat(image.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
