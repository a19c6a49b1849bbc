"""What the functions of `bilevel.data.corruption` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Arrays that share their leading axis N, with integer `label` `[N]`."""


def annotated(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays with `clean_label`, `corrupted` and `relevant`, as far as they lack them.

    Raises:
        UserError: there is no array `label`.
    """
    if "label" not in arrays:
        raise UserError(f"There is no array 'label' ({', '.join(arrays) or 'no array at all'}); give labelled data.")
    label = arrays["label"]
    clean = arrays.get("clean_label", label)
    relevant = arrays.get("relevant", np.ones(len(label), bool))
    return {**arrays, "clean_label": clean, "corrupted": label != clean, "relevant": relevant}


def relabelled(arrays: Arrays, label: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Annotated arrays with other labels."""
    label = label.astype(np.int32)
    return {**arrays, "label": label, "corrupted": label != arrays["clean_label"]}


def chosen(arrays: Arrays, rows: NDArray[np.int64], what: str) -> dict[str, NDArray[Any]]:
    """Some rows; `what` they are is for the error raised when there is none."""
    if not len(rows):
        raise UserError(f"There is no row of {what}; ask for others.")
    return {name: array[rows] for name, array in arrays.items()}


def generators(seed: int, count: int) -> list[np.random.Generator]:
    """Independent generators."""
    if seed < 0:
        raise UserError(f"The seed is {seed}; it must not be negative.")
    return [np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence(seed).spawn(count)]


def check_fraction(fraction: float) -> None:
    """Raise a UserError unless the fraction is one."""
    if not 0 <= fraction <= 1:
        raise UserError(f"The fraction {fraction} is not between 0 and 1; give the share of labels to change.")


def checked_labels(label: NDArray[Any], num_classes: int) -> NDArray[Any]:
    """The labels, if all are from 0 to `num_classes − 1`."""
    if len(label) and (label.min() < 0 or label.max() >= num_classes):
        raise UserError(
            f"The labels run from {label.min()} to {label.max()}, but num_classes={num_classes}; give the number of classes."
        )
    return label
