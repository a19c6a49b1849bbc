"""Labelled rows from packages: those that come with scikit-learn, and TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.data.digests import digest
from bilevel.data.labelled.decoding import resized
from bilevel.data.labelled.images import Image, cached_images
from bilevel.data.labelled.parts import TEST, VALID, Part, Parts, checked_part
from bilevel.data.tfds import identify_records, open_records, parse_spec
from bilevel.types import UserError

_EMBEDDED = ("digits", "breast_cancer", "iris", "wine")


def sklearn_parts(spec: str) -> Parts:
    """`sklearn:NAME`: digits (images `[N, 8, 8, 1]`), or a table of features; nothing is downloaded.

    Raises:
        UserError: an unknown name, or scikit-learn is missing.
    """
    name = spec.removeprefix("sklearn:")
    if name not in _EMBEDDED:
        known = ", ".join(f"sklearn:{name}" for name in _EMBEDDED)
        raise UserError(f"{spec!r} is not known; the sources of this kind are {known}.")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            f"{spec} needs scikit-learn, which cannot be imported ({error}); "
            "install it with: pip install 'bilevel[experiments]'"
        ) from error
    data: Any = getattr(datasets, f"load_{name}")()
    inputs = data.data
    if name == "digits":  # 17 grey values
        inputs = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return Parts(spec, checked_part(inputs, data.target, spec), None, None, tuple(map(str, data.target_names)))


def tfds_parts(spec: str, size: int | None, cache_dir: Path) -> Parts:
    """`tfds:NAME`: the image and the label of each record; the configuration and the version may be part of NAME.

    Without a test split that has labels (those of ImageNet are −1), the validation split is the test part.

    Raises:
        UserError: an unknown name, no image or no label, or a package that is missing.
    """
    name, split, field = parse_spec(spec)
    if split != "train" or field is not None:
        raise UserError(f"{spec}: labelled data come with all their splits; write tfds:NAME.")
    train = open_records(spec, name, "train")
    info = train.dataset_info
    image, label = _keys(spec, info.features)

    def part(split: str | None) -> Part | None:
        if split is None:
            return None
        records = train if split == "train" else open_records(spec, name, split)
        key = digest(["tfds", identify_records(records, split, f"{image},{label}"), size or 0])
        return cached_images(f"{spec} ({split})", key, _reader(records, spec, split, image, label, size), cache_dir)

    valid, test = (next((split for split in names if split in info.splits), None) for names in (VALID, TEST))
    if test is None or int(open_records(spec, name, test)[0][label]) < 0:
        valid, test = None, valid
    first = part("train")
    assert first is not None
    names = tuple(getattr(info.features[label], "names", None) or ())
    return Parts(spec, first, part(valid), part(test), names, test or "test")


def _reader(records: Any, spec: str, split: str, image: str, label: str, size: int | None) -> Any:
    def read() -> Iterator[Image]:
        for i in range(len(records)):
            record = records[i]
            yield Image(f"{spec} ({split}), record {i}", resized(record[image], size), int(record[label]))

    return read


def _keys(spec: str, features: Any) -> tuple[str, str]:
    """The names of the image and of the label: "image" and "label", or the only fields that can be one."""

    def only(preferred: str, suits: Any) -> str | None:
        names = [name for name in features if suits(features[name])]
        return preferred if preferred in names else names[0] if len(names) == 1 else None

    image = only("image", lambda f: len(f.shape or ()) == 3 and f.np_dtype == np.uint8)
    label = only("label", lambda f: f.shape == () and np.issubdtype(f.np_dtype, np.integer))
    if image is None or label is None:
        missing = "an image (uint8 [height, width, channels])" if image is None else "an integer label"
        raise UserError(
            f"{spec}: none of its fields ({', '.join(map(repr, features))}) is clearly {missing}; "
            "give a data set with the fields 'image' and 'label'."
        )
    return image, label
