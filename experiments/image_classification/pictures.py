"""What the scorer of DDS thinks of the training rows: shares by weight, and the images it weighs most and least."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.types import LogitFn, Params
from experiments.image_classification.data import SHOWN_CLASSES, ImageData

SCORES = "scores.npz"
PICTURE = "images.svg"
ROWS, COLUMNS = 3, 12
TITLES = ("highest weights", "lowest weights")


def save_scores(
    directory: Path, weights: Params, logits: LogitFn, data: ImageData, batch_size: int
) -> dict[str, float]:
    """Scores all training rows, keeps the scores, and draws the images that have the highest and the lowest.

    Args:
      directory: of the run.
      weights: of the scorer.
      logits: of the scorer.
      data: all data.
      batch_size: rows that the scorer was shown at once while it learned.

    Returns:
      `weight_on_corrupted`, the share of the softmax over the training set that rows with wrong labels get (if there are
      some), and `weight_share/CLASS`, the share of each true class.

    Reference: Wang et al. (DDS), figures 3 and 4.
    """
    found = _scores(weights, logits, data, batch_size)
    np.savez(directory / SCORES, scores=found)
    if data.inputs == "image":
        (directory / PICTURE).write_text(draw(found, data))
    share = np.exp(found - found.max())
    share /= share.sum()
    results = {}
    if data.marked("corrupted"):
        results["weight_on_corrupted"] = float(share[data.known("corrupted").astype(bool)].sum())
    if data.classes <= SHOWN_CLASSES:
        mass = np.bincount(data.known("clean_label", "label").astype(int), share, minlength=data.classes)
        results |= {f"weight_share/{name}": float(m) for name, m in zip(data.class_names, mass, strict=True)}
    return results


def _scores(weights: Params, logits: LogitFn, data: ImageData, batch_size: int) -> NDArray[np.float64]:
    """Logits of all training rows, `[N]`, from batches like those of training.

    A scorer with BatchNorm normalises by its batch, and learned on batches drawn at random: stored order may go class by class.
    """
    score, count = jax.jit(logits), len(data.train)
    order = np.random.default_rng(0).permutation(count)
    found = np.empty(count)
    for start in range(0, count, batch_size):
        places = np.arange(start, start + batch_size) % count  # the last batch is filled with the first rows of all
        rows = order[places]
        logit = np.asarray(score(weights, data.train.rows(rows)), np.float64)
        found[rows[: count - start]] = logit[: count - start]
    return found


def draw(scores: NDArray[np.float64], data: ImageData, titles: tuple[str, str] = TITLES) -> str:
    """The images with the highest and the lowest scores, with their labels: the text of an SVG file. Wrong labels are red."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    order = np.argsort(-scores, kind="stable")
    count = min(ROWS * COLUMNS, len(order) // 2)
    parts = dict(zip(titles, (order[:count], order[::-1][:count]), strict=True))
    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        for place, (title, rows) in enumerate(parts.items()):
            panel = figure.add_subplot(2, 1, place + 1)
            panel.set_title(title, fontsize=10)
            panel.axis("off")
            _mosaic(panel, rows, data)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _mosaic(panel: Any, rows: NDArray[np.int64], data: ImageData) -> None:
    """Images side by side, each below its label."""
    images, names, wrong = data.train.arrays["image"], data.class_names, data.known("corrupted")
    height, width = images.shape[1:3]
    label = max(2, height // 4)  # pixels of a label's line
    lines = -(-len(rows) // COLUMNS)
    canvas = np.full((lines * (height + label), COLUMNS * (width + 1), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        top, left = i // COLUMNS * (height + label) + label, i % COLUMNS * (width + 1)
        canvas[top : top + height, left : left + width] = _colours(images[row])
        name, color = names[data.train.arrays["label"][row]], "red" if wrong[row] else "black"
        panel.text(left + width / 2, top - 1, name, fontsize=7, color=color, ha="center", va="bottom")
    panel.imshow(canvas, interpolation="nearest")


def _colours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image `[H, W, C]` as it can be shown, `[H, W, 3]`: of 3 or 4 channels the first 3, of others the mean as grey."""
    if image.shape[-1] in (3, 4):
        return image[..., :3]
    return np.repeat(image.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
