"""Labelled images and features, as disjoint parts: train, specific, perhaps held out, and test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.data.labelled.cuts import Order, flags_of
from bilevel.data.labelled.files import file_parts
from bilevel.data.labelled.packages import sklearn_parts, tfds_parts
from bilevel.data.labelled.parts import Part, Parts
from bilevel.data.loading.arrays import ArrayDataset
from bilevel.types import UserError

PartName = Literal["train", "specific", "held_out", "test"]
_BLOCK = 4096
_PLAUSIBLE_CLASSES = 20_000
"""So many may have fewer rows than classes."""


@dataclass(frozen=True)
class LabelledData:
    """Disjoint sets of labelled rows; made by `open_labelled`.

    The arrays of each set: `image` uint8 `[N, H, W, C]` or `features` float32 `[N, d]`; `label` int32 `[N]`; and `source_row`
    int32 `[N]`, the row's number in the part of the source that it was taken from.
    """

    name: str
    train: ArrayDataset
    specific: ArrayDataset
    """What weights are learned from, or choices made by; never part of train or test."""
    held_out: ArrayDataset | None
    """What another model is trained on (the irreducible losses of RHO-LOSS); None unless asked for."""
    test: ArrayDataset
    num_classes: int
    class_names: tuple[str, ...]
    """In the order of the labels; empty if the source does not name them."""
    rule: str
    """Where the rows of each set come from, in a sentence."""
    has_valid_part: bool = False
    """Whether specific and held_out come from a validation part of the source: `source_row` numbers its rows there."""

    def transform(self, function: Callable[[Mapping[str, Any]], Mapping[str, Any]], *parts: PartName) -> LabelledData:
        """The same with the arrays of some sets replaced, as by the functions of `bilevel.data.corruption`.

            data = data.transform(lambda arrays: uniform_noise(arrays, 0.1, num_classes=10, seed=0), "train")

        Args:
            function: from the arrays of a set to the new ones.
            *parts: names of sets; `held_out` is passed over where there is none.
        """
        changed: dict[str, Any] = {}
        for part in parts:
            if (old := getattr(self, part)) is not None:
                changed[part] = ArrayDataset(function(old.arrays), name=old.name)
        return dataclasses.replace(self, **changed)


def open_labelled(
    spec: str = "sklearn:digits",
    *,
    specific: float = 0.1,
    held_out: float | None = None,
    test: float = 0.2,
    limit: int | None = None,
    split: Literal["last", "random"] = "random",
    seed: int = 0,
    size: int | None = None,
    label: str | None = None,
    cache_dir: str | Path = "~/.cache/bilevel",
) -> LabelledData:
    """Open labelled data as disjoint sets.

    The rows of the source's training part (its first `limit` rows) are put in an order: as stored (`split="last"`, what DDS,
    appendix A.4, and RLSampler, appendix B, do: only for sources that are not sorted by class) or a permutation that depends on
    `seed` and the number of rows only ("random"). From the end of that order are taken: the test set, if the source has none of
    its own; before it the specific set; before that the held-out set. The others are the training set. A source with a validation
    part of its own (CINIC-10) gives its training part whole: specific and held_out are taken from the end of the validation part,
    in the same manner, and with `held_out=None` all its rows that are not specific are held out (with `held_out=0` they are
    omitted).
    In each set rows keep their stored order.

    Args:
        spec: one of
            - `sklearn:digits`, 1,797 images that come with scikit-learn; `sklearn:iris`, `wine`, `breast_cancer`: features;
            - `tfds:NAME`, an image data set read without TensorFlow; TFDS_DATA_DIR says where the data are. Without a test split
              that has labels (ImageNet), the validation split is the test set;
            - a folder with train/CLASS/*.png (or .jpg, .webp, .bmp, .gif, .tif), likewise test and perhaps valid, as of CINIC-10;
            - a .npz file with x_train, y_train, x_test, y_test (and x_valid, y_valid), or with one pair of inputs (`image`,
              `images`, `features`, `x`, `data`) and labels (`label`, `labels`, `y`, `target`);
            - a .csv (or .csv.gz) file, whose first line names the columns, or a .parquet file, with a column of labels called so;
              all other columns are features and hold numbers, but those that number the rows, which are left out; such a file
              may also be a URL (with fsspec);
            - a prefix DIR/NAME of files NAME_train.npz, NAME_test.npz (and NAME_valid.npz) with such pairs, or of tables, or the
              folder, if it holds one such data set. NAME_train_jpeg.npz holds JPEG files end to end: `jpeg` uint8, `offsets`
              `[N + 1]`.
            Inputs of arrays are images, uint8 `[N, H, W]` or `[N, H, W, C]`, or features, numbers `[N, d]`. Labels are whole
            numbers from 0, or text, which names the classes; these are then numbered in alphabetical order.
        specific: rows of the specific set, or, below 1, their share of the rows it is taken from.
        held_out: likewise; 0 holds out nothing; None holds out nothing, or what a validation part leaves.
        test: likewise, for a source without a test set of its own.
        limit: use only this many rows of the source's training part, the first ones (DDS uses 4,000 of CIFAR-10).
        split: "random" or "last".
        seed: of the random order; not negative.
        size: resize decoded images to this height and width.
        label: name of the labels, for files: of an array, or of a column; not for an archive with x_train, or a folder of images.
        cache_dir: where decoded images are kept; made if it does not exist.

    Returns:
        The sets, and the rule by which they were made.

    Raises:
        UserError: something is missing or of the wrong kind, or the sets are larger than the data.
    """
    for what, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{what}={value} is not possible; give a whole number from 1.")
    order = Order(split, seed)
    parts = _open_parts(spec, size, Path(cache_dir), label)
    _check_alike(parts)
    classes = _classes(parts)
    held = {"specific": specific, "held_out": held_out} if held_out else {"specific": specific}
    own_test = {} if parts.test else {"test": test}
    train = parts.train if limit is None else Part(*(array[:limit] for array in parts.train))
    first = f"{spec} (train)" if limit is None else f"{spec} (first rows of train)"
    cuts = own_test if parts.valid else {**own_test, **held}
    rows, rule = order.cut(len(train.labels), cuts, first, rest="train")
    if "train" not in rows:
        raise UserError(
            f"{spec}: {', '.join(cuts)} take all {len(train.labels)} rows; leave some to train on ({flags_of(cuts)})."
        )
    sets = {name: _dataset(train, chosen, f"{spec} ({name})") for name, chosen in rows.items()}
    if parts.valid is not None:
        left = "held_out" if held_out is None else ""
        rows, also = order.cut(len(parts.valid.labels), held, f"{spec} (valid)", rest=left)
        sets |= {name: _dataset(parts.valid, chosen, f"{spec} ({name})") for name, chosen in rows.items()}
        rule = f"{rule}; {also}"
    if parts.test is not None:
        sets["test"] = _dataset(parts.test, np.arange(len(parts.test.labels)), f"{spec} (test)")
        rule = f"{rule}; all {len(sets['test'])} rows of {spec} ({parts.test_name}) are test"
    return LabelledData(
        spec,
        sets["train"],
        sets["specific"],
        sets.get("held_out"),
        sets["test"],
        classes,
        parts.class_names,
        rule,
        has_valid_part=parts.valid is not None,
    )


def _open_parts(spec: str, size: int | None, cache_dir: Path, label: str | None) -> Parts:
    if not spec.strip():
        raise UserError(
            "The data specification (--data.source) is empty; give sklearn:digits, tfds:NAME, a .npz or .csv file or a folder."
        )
    if label is not None and spec.startswith(("sklearn:", "tfds:")):
        raise UserError(f"{spec} knows its labels; leave label={label!r} (--data.label) out.")
    if spec.startswith("sklearn:"):
        return sklearn_parts(spec)
    if spec.startswith("tfds:"):
        return tfds_parts(spec, size, cache_dir)
    return file_parts(spec, size, cache_dir, label)


def _check_alike(parts: Parts) -> None:
    shapes = {part.inputs.shape[1:] for part in (parts.train, parts.valid, parts.test) if part}
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(f"{parts.name}: the rows of its parts have the shapes {found}; give parts that are alike.")


def _classes(parts: Parts) -> int:
    largest = max(int(part.labels.max()) for part in (parts.train, parts.valid, parts.test) if part)
    if parts.class_names and largest >= len(parts.class_names):
        raise UserError(
            f"{parts.name}: there is a label {largest}, but only {len(parts.class_names)} classes are named."
        )
    rows = sum(len(part.labels) for part in (parts.train, parts.valid, parts.test) if part)
    if not parts.class_names and largest >= max(rows, _PLAUSIBLE_CLASSES):
        raise UserError(
            f"{parts.name}: the labels run up to {largest}, but there are {rows} rows: name the labels (--data.label) if "
            "these are numbers of rows, or number the classes from 0."
        )
    return len(parts.class_names) or largest + 1


def _dataset(part: Part, rows: NDArray[np.int64], name: str) -> ArrayDataset:
    """Some rows, in increasing order, as a data set; without a copy if they are consecutive."""
    consecutive = rows[-1] - rows[0] == len(rows) - 1
    chosen: Any = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows
    key = "image" if part.inputs.ndim == 4 else "features"
    arrays = {key: part.inputs[chosen], "label": part.labels[chosen], "source_row": rows.astype(np.int32)}
    return ArrayDataset(arrays, name=name)


def channel_statistics(dataset: ArrayDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in units of 255: for `bilevel.nn.augment`.

    Args:
        dataset: with an array `image`, uint8 `[N, H, W, C]`; the training set, as RLSampler, appendix B, says.

    Raises:
        UserError: the data set has no images, or a channel is constant.
    """
    images = dataset.arrays.get("image")
    if images is None:
        raise UserError(f"{dataset.name} has no array 'image' ({', '.join(dataset.arrays)}); give images.")
    return statistics_of(images, dataset.name)


def statistics_of(images: NDArray[np.uint8], name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of images, in units of 255.

    Args:
        images: uint8 `[N, H, W, C]`.
        name: of the data set, for messages.

    Raises:
        UserError: a channel is constant.
    """
    sums = np.zeros((2, images.shape[-1]))
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].reshape(-1, images.shape[-1]).astype(np.float64)
        sums += np.stack([block.sum(0), np.square(block).sum(0)])
    mean, square = sums / (images.size // images.shape[-1])
    std = np.sqrt(square - mean**2)
    if not (std > 0).all():
        raise UserError(f"{name}: a channel has the same value everywhere; leave it out.")
    return tuple(map(float, mean / 255)), tuple(map(float, std / 255))
