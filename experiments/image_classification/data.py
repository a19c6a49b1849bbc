"""The data sets of an experiment: what learners read, and what is known about the rows for analysis alone."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.data import ArrayDataset, LabelledData, channel_statistics, open_labelled
from bilevel.nn.augment import preparation
from bilevel.nn.classification import Prepare
from bilevel.types import Array, UserError
from experiments.image_classification.config import DataConfig

SHOWN_CLASSES = 20
"""With more classes than these, their shares are not reported."""


@dataclass(frozen=True)
class ImageData:
    """All data of one experiment. The sets hold `image` uint8 `[N, H, W, C]` or `features` float32 `[N, d]`, and `label`."""

    sets: LabelledData
    """With what is known about the rows: see `bilevel.data.corruption`."""
    train: ArrayDataset
    """Like the other sets, without it."""
    dev: ArrayDataset
    holdout: ArrayDataset | None
    test: ArrayDataset
    inputs: str
    """Name of the inputs."""
    plain: Prepare
    """Inputs as networks take them."""
    augmented: Prepare
    """The same, augmented as the flags say."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return self.train.arrays[self.inputs].shape[1:]

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.sets.num_classes

    @property
    def class_names(self) -> list[str]:
        """Their names, or numbers."""
        return list(self.sets.class_names) or [str(c) for c in range(self.classes)]

    def known(self, name: str, otherwise: str | None = None) -> NDArray[np.generic]:
        """What is known about the training rows: `corrupted`, `relevant` or `clean_label`, `[N]`.

        Args:
          name: of the array.
          otherwise: the array to take where nothing was made wrong; None: zeros.
        """
        arrays = self.sets.train.arrays
        if name in arrays:
            return arrays[name]
        return arrays[otherwise] if otherwise else np.zeros(len(self.train), bool)

    def marked(self, name: str) -> bool:
        """Whether some rows of the training set are `corrupted`, or not `relevant`."""
        found = self.sets.train.arrays.get(name)
        return found is not None and bool((found if name == "corrupted" else ~found).any())


def open_sets(config: DataConfig) -> LabelledData:
    """The sets as they are in the source.

    Raises:
      UserError: for data that are missing, broken or too small.
    """
    return open_labelled(
        config.source,
        dev=_rows(config.dev),
        holdout=_rows(config.holdout),
        test=_rows(config.test),
        limit=config.limit,
        split=config.split,
        seed=config.seed,
        size=config.size,
        label=config.label,
        cache_dir=config.cache_dir,
    )


def _rows(number: float) -> float:
    return int(number) if number >= 1 and float(number).is_integer() else number


def prepared(config: DataConfig, sets: LabelledData) -> ImageData:
    """The sets as learners read them.

    Raises:
      UserError: augmentation of features.
    """
    inputs = "image" if "image" in sets.train.arrays else "features"

    def bare(part: ArrayDataset) -> ArrayDataset:
        return ArrayDataset({name: part.arrays[name] for name in (inputs, "label")}, name=part.name)

    if inputs == "image":
        mean, std = channel_statistics(sets.train)
        plain = preparation(mean, std, augment=False)
        flip = config.augment == "crop_flip"
        augmented = preparation(
            mean, std, augment=config.augment != "none", padding=config.padding, mode=config.padding_mode, flip=flip
        )
    else:
        features = sets.train.arrays["features"]
        if config.augment != "none":
            raise UserError(
                f"--data.augment {config.augment} needs images, but {config.source} holds rows of {features.shape[1]} features: "
                "leave it out."
            )
        plain = augmented = _standardized(features) if config.standardize else _as_they_are
    holdout = None if sets.holdout is None else bare(sets.holdout)
    train, dev, test = bare(sets.train), bare(sets.dev), bare(sets.test)
    return ImageData(sets, train, dev, holdout, test, inputs, plain, augmented)


def _as_they_are(rows: Array, rng: Array) -> Array:
    return rows


def _standardized(features: NDArray[np.floating]) -> Prepare:
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # A constant column's deviation is rounding alone.
    scale = 1 / np.where(std > 1e-7 * np.abs(mean), std, 1)

    def prepare(rows: Array, rng: Array) -> Array:
        return (rows - jnp.asarray(mean, jnp.float32)) * jnp.asarray(scale, jnp.float32)

    return prepare
