"""Tiny labelled images, flags of small runs on them, and the opened task."""

from pathlib import Path
from typing import Any

import numpy as np

from bilevel.data import LabelledData, open_labelled
from bilevel.tasks.classification import TASK, ClassificationConfig, DataConfig, ModelConfig, Rows


def quarters(folder: Path) -> Path:
    """Write 240 images of 6 × 6 pixels in 4 classes: a bright quarter."""
    rng = np.random.default_rng(0)
    label = np.arange(240) % 4
    images = rng.integers(0, 60, (240, 6, 6, 1))
    for row, c in enumerate(label):
        images[row, 3 * (c // 2) : 3 * (c // 2) + 3, 3 * (c % 2) : 3 * (c % 2) + 3] += 150
    np.savez(folder / "quarters.npz", image=images.astype(np.uint8), label=label)
    return folder / "quarters.npz"


def digit_flags(**given: Any) -> dict[str, Any]:
    """Return the flags of a comparison on 200 digits by a perceptron of 8 units a layer."""
    return {"data__limit": 200, "model__width": 8, "steps_per_call": 2, "targets": 0.01, **given}


def image_flags(source: Path, **given: Any) -> dict[str, Any]:
    """Return the flags of a comparison on a file."""
    return {"data__source": source, "model__width": 8, "steps_per_call": 2, **given}


def config_of(source: Path | str, model: ModelConfig | None = None, **data: Any) -> ClassificationConfig:
    return ClassificationConfig(DataConfig(source=str(source), **data), model or ModelConfig(width=8))


def rows_of(source: Path | str, folder: Path | None = None, **data: Any) -> Rows:
    """Open the splits."""
    return TASK.open(config_of(source, **data), folder or Path(source).parent)


def clean_sets(source: Path) -> LabelledData:
    """Return the same rows with the labels of the file."""
    return open_labelled(str(source), specific=0.1, held_out=0.2, test=0.2)
