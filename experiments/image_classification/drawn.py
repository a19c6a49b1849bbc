"""How often a run drew which rows and classes: numbers, a plot, and the images that it drew most and least."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel import samplers
from bilevel.training.run_dir import write_atomically
from experiments.image_classification import pictures
from experiments.image_classification.data import SHOWN_CLASSES, ImageData

FREQUENCIES = "frequencies.json"
COUNTS = "counts.npz"
PLOT = "frequencies.svg"
PICTURE = "drawn.svg"
_TITLES = ("drawn most often", "drawn least often")
_GRAY, _BLUE = "#8A8A8A", "#0072B2"


def save_frequencies(directory: Path, sequence: NDArray[np.integer], data: ImageData) -> dict[str, float]:
    """Counts the rows and classes of a sequence, and keeps what figure 3 shows: counts, their spread, plots.

    Args:
      directory: of the run.
      sequence: the rows drawn, `[steps, b]`.
      data: all data.

    Returns:
      `corrupted_often` and `corrupted_rarely`, the shares of rows with wrong labels among the tenth drawn most and least often
      (if there are some), and `spread`, the variance of the counts over their mean: 1 by chance, 0 for whole epochs.

    Reference: RLSampler, section 6.2 and figure 3.
    """
    drawn = samplers.row_counts(sequence, len(data.train))
    counts = np.asarray(drawn)
    classes = np.asarray(samplers.class_counts(drawn, _true_classes(data), data.classes))
    found = _numbers(counts, classes, data)
    write_atomically(directory / FREQUENCIES, json.dumps(found, indent=2) + "\n")
    np.savez(directory / COUNTS, counts=counts, class_counts=classes)
    (directory / PLOT).write_text(_plot(counts, classes, data))
    if data.inputs == "image":
        (directory / PICTURE).write_text(pictures.draw(counts.astype(float), data, _TITLES))
    corrupted = found.get("corrupted", {})
    return {f"corrupted_{name}": corrupted[name] for name in ("often", "rarely") if name in corrupted} | {
        "spread": found["rows"]["spread"]
    }


def _numbers(counts: NDArray[np.int32], classes: NDArray[np.int32], data: ImageData) -> dict[str, Any]:
    """The content of frequencies.json."""
    found: dict[str, Any] = {
        "draws": int(counts.sum()),
        "rows": {**_spread(counts), "never_drawn": float((counts == 0).mean())},
        "rows_by_chance": _spread(_by_chance(counts)),
        "classes": {**_spread(classes), "counts": dict(zip(data.class_names, classes.tolist(), strict=True))},
    }
    if data.marked("corrupted"):
        corrupted, (low, high) = data.known("corrupted").astype(bool), np.percentile(counts, [10, 90])
        found["corrupted"] = {
            "all": float(corrupted.mean()),
            # Whole sets of equal counts, so that the order of the rows does not matter.
            "often": float(corrupted[counts >= high].mean()),
            "rarely": float(corrupted[counts <= low].mean()),
            "drawn": float(counts[corrupted].sum() / counts.sum()),
        }
    return found


def _spread(counts: NDArray[np.integer]) -> dict[str, float]:
    values = samplers.frequencies(jnp.asarray(counts))._asdict()
    return {**{name: float(value) for name, value in values.items()}, "spread": float(counts.var() / counts.mean())}


def _by_chance(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """As many draws, each from all rows alike, with replacement: what no preference looks like."""
    return np.random.default_rng(0).multinomial(counts.sum(), np.full(len(counts), 1 / len(counts)))


def _true_classes(data: ImageData) -> NDArray[np.generic]:
    return data.known("clean_label", "label")


def _plot(counts: NDArray[np.int32], classes: NDArray[np.int32], data: ImageData) -> str:
    """Figures 3a and 3b as the text of an SVG file; class counts are per row of the class, as classes may differ in size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        sizes = np.bincount(_true_classes(data).astype(int), minlength=data.classes)
        left.bar(np.arange(data.classes), classes / np.maximum(sizes, 1), color=_BLUE)
        if data.classes <= SHOWN_CLASSES:
            left.set_xticks(np.arange(data.classes), data.class_names, rotation=45)
        left.set(xlabel="true class", ylabel="draws for each row of the class")
        share = np.linspace(0, 100, len(counts))
        right.plot(share, np.sort(_by_chance(counts))[::-1], color=_GRAY, label="by chance")
        right.plot(share, np.sort(counts)[::-1], color=_BLUE, label="drawn")
        right.set(xlabel="rows, the most drawn first (%)", ylabel="draws", ylim=(0, None))
        right.legend(frameon=False)
        for panel in (left, right):
            panel.axhline(counts.mean(), color=_GRAY, linestyle=":")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
