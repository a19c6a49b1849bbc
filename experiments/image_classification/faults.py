"""The data of an experiment with the faults that its flags ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bilevel.data import LabelledData, digest
from bilevel.data.labelled import corruption as faults
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError
from experiments.image_classification.auxiliary import fit, settings_of
from experiments.image_classification.config import Config
from experiments.image_classification.data import ImageData, open_sets, prepared
from experiments.image_classification.known import predictions

PAIRS = "confused.json"
Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def load_data(config: Config) -> ImageData:
    """Opens the data and makes wrong, irrelevant or rare what the flags say.

    Rare classes are those of the true labels; then labels are made wrong; last, classes are marked.

    Raises:
      UserError: for data or flags that are not possible.
    """
    d = config.data
    sets = open_sets(d)
    if d.imbalance != 1.0:
        sets = sets.transform(
            lambda arrays: faults.long_tail(arrays, d.imbalance, num_classes=sets.num_classes, seed=d.seed), "train"
        )
    noisy = noise(config, sets)
    if noisy is not None:
        sets = sets.transform(noisy, "train")
        sets = sets.transform(noisy, "holdout") if d.noisy_holdout else sets
    if d.relevant == "half":
        counted = faults.half_of_classes(sets.num_classes, seed=d.seed)
        sets = sets.transform(lambda arrays: faults.mark_relevant(arrays, counted), "train")
        sets = sets.transform(lambda arrays: faults.only_classes(arrays, counted), "dev", "holdout", "test")
    return prepared(d, sets)


def noise(config: Config, sets: LabelledData) -> Change | None:
    """What makes labels wrong; None for no noise.

    Raises:
      UserError: an unknown kind, a fraction out of range, or recorded labels for rows of another part.
    """
    d, classes = config.data, sets.num_classes
    if d.noise == "none":
        return None
    if ":" in d.noise or d.noise.endswith(".npz"):
        path, _, name = d.noise.rpartition(":")
        if not path:
            raise UserError(f"--data.noise {d.noise} names no array: write FILE.npz:NAME.")
        if d.noisy_holdout and sets.has_valid_part:
            raise UserError(
                f"--data.noise {d.noise} holds labels of the training rows, but {d.source} takes its held-out rows from a "
                "validation part of its own: leave --data.noisy-holdout out."
            )
        return lambda arrays: faults.recorded_labels(arrays, path, name, num_classes=classes)
    share = (0.5 if d.noise == "confused" else 0.4) if d.noise_fraction is None else d.noise_fraction
    present = np.unique(sets.train.arrays["label"]).tolist()
    if d.noise == "uniform":
        return lambda arrays: faults.uniform_noise(arrays, share, num_classes=classes, seed=d.seed, among=present)
    if d.noise == "pair":
        pairs = dict(zip(present, present[1:] + present[:1], strict=True))
    elif d.noise == "confused":
        pairs = confused_classes(config, sets)
    else:
        raise UserError(f'--data.noise "{d.noise}" is unknown: give none, uniform, pair, confused or FILE.npz:NAME.')
    return lambda arrays: faults.pair_noise(arrays, pairs, fraction=share, seed=d.seed)


def confused_classes(config: Config, sets: LabelledData) -> dict[int, int]:
    """The four classes that a model, trained on the training rows with their right labels, takes most often for another one.

    It is asked about the dev and held-out rows; its answer is kept in the run directory, in a folder for each set of settings.
    """
    data = prepared(config.data, sets)
    settings = _confusion_settings(config, data)
    file = config.run_dir / "confusion" / digest([json.dumps(settings, sort_keys=True)])[:12] / PAIRS
    if not file.exists():
        model = fit(config, data, None, data.train, file.parent)
        confusion = np.zeros((data.classes, data.classes))
        for rows in (data.dev, data.holdout):
            if rows is not None:
                np.add.at(confusion, (rows.arrays["label"], predictions(model, rows)), 1)
        pairs = faults.most_confused(confusion, min(4, data.classes))
        write_atomically(file, json.dumps({"settings": settings, "pairs": pairs}, indent=2) + "\n")
    return {int(source): target for source, target in json.loads(file.read_text())["pairs"].items()}


def _confusion_settings(config: Config, data: ImageData) -> dict[str, Any]:
    """What decides which classes are confused, as JSON values."""
    asked = {"dev": data.dev, "holdout": data.holdout}
    return {
        **settings_of(config, data, None, data.train),
        "padding": config.data.padding,
        "standardize": config.data.standardize,
        **{name: rows and rows.content_hash for name, rows in asked.items()},
    }
