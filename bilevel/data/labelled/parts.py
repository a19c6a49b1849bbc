"""Labelled rows as their source gives them, before they are split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError

TRAIN, VALID, TEST = ("train",), ("valid", "validation", "val", "dev"), ("test",)
"""What sources call their parts."""


_FINEST, _ROUNDING = 1e-6, 1e-13
"""Standard deviations over means: below the first, float32 keeps fewer than some ten steps; below the other, it is constant."""


class Part(NamedTuple):
    """One part of a source."""

    inputs: NDArray[Any]
    """Images uint8 `[N, H, W, C]`, or features float32 `[N, d]`."""
    labels: NDArray[np.int32]
    """int32 `[N]`, not negative."""


@dataclass(frozen=True)
class Parts:
    """A source of labelled rows."""

    name: str
    train: Part
    valid: Part | None
    """The source's own validation part, if it has one."""
    test: Part | None
    """The source's own test part, if it has one."""
    class_names: tuple[str, ...] = ()
    """In the order of the labels; empty if the source does not name them."""
    test_name: str = "test"
    """What the source calls its test part."""


def checked_part(inputs: NDArray[Any], labels: NDArray[Any], where: str) -> Part:
    """A part of arrays of the user.

    Args:
        inputs: uint8 `[N, H, W]` or `[N, H, W, C]`, or numbers `[N, d]`.
        labels: integers `[N]` or `[N, 1]`.
        where: for messages.

    Raises:
        UserError: another type or shape, channels before the pixels, negative labels, or features that are not finite.
    """
    labels = whole_labels(labels, where)
    if inputs.ndim == 0 or len(inputs) != len(labels):
        raise UserError(
            f"{where}: the inputs are {_described(inputs)}, the labels {_described(labels)}; give as many of each."
        )
    if len(labels) == 0:
        raise UserError(f"{where} holds no rows; give data that are not empty.")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UserError(f"{where}: the labels run from {labels.min()} to {labels.max()}; number the classes from 0.")
    return Part(_checked_inputs(inputs, where), labels.astype(np.int32))


def whole_labels(labels: NDArray[Any], where: str) -> NDArray[Any]:
    """Labels `[N]` or `[N, 1]`, as `[N]`.

    Raises:
        UserError: another type or shape.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: the labels are {_described(labels)}; give integers from 0, or text [rows].")
    return labels


def class_names(labels: NDArray[Any]) -> tuple[str, ...]:
    """The names of the classes, sorted, if labels are text `[N]`; () if they are not."""
    return tuple(map(str, np.unique(labels))) if labels.dtype.kind == "U" else ()


def numbered(labels: NDArray[Any], names: tuple[str, ...], where: str) -> NDArray[Any]:
    """The labels as they are, or for text their places among the names, int64 `[N]`.

    Raises:
        UserError: a label that is blank, or not among the names.
    """
    if labels.dtype.kind != "U":
        return labels
    blank = np.char.strip(labels) == ""
    if blank.any():
        raise UserError(f"{where}: row {int(np.argmax(blank))} has no label; leave such rows out.")
    unknown = sorted(set(map(str, np.unique(labels))) - set(names))
    if unknown:
        raise UserError(
            f"{where} has a class {unknown[0]!r} that train has not; the classes there are {', '.join(names) or 'numbers'}."
        )
    return np.searchsorted(np.asarray(names), labels)


def _checked_inputs(inputs: NDArray[Any], where: str) -> NDArray[Any]:
    if inputs.ndim in (3, 4) and inputs.dtype == np.uint8 and 0 not in inputs.shape:
        if inputs.ndim == 4 and _channels_first(inputs.shape):
            raise UserError(
                f"{where}: images of the shape {list(inputs.shape[1:])} look as if the channels came first; give [rows, height, "
                "width, channels], as np.moveaxis(images, 1, -1) makes them."
            )
        return inputs[..., None] if inputs.ndim == 3 else inputs
    if inputs.ndim == 2 and inputs.dtype.kind in "biuf":
        features = inputs.astype(np.float32)
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise UserError(f"{where}: the features of row {row} are not finite in float32; fill in or drop such rows.")
        _check_precision(inputs, where)
        return features
    raise UserError(
        f"{where}: the inputs are {_described(inputs)}; give images uint8 [rows, height, width, channels] with values "
        "from 0 to 255, or numbers [rows, features]."
    )


def _check_precision(inputs: NDArray[Any], where: str) -> None:
    """Refuse features that vary by less than float32 can tell, such as times in nanoseconds."""
    mean, std = np.abs(inputs.mean(0, dtype=np.float64)), inputs.std(0, dtype=np.float64)
    lost = (std < _FINEST * mean) & (std > _ROUNDING * mean)
    if lost.any():
        i = int(np.argmax(lost))
        raise UserError(
            f"{where}: feature {i} varies by {std[i]:.3g} around {mean[i]:.3g}, too little for float32; subtract its mean."
        )


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Whether `[N, H, W, C]` is rather `[N, C, H, W]`: square images of 1 or 3 channels."""
    return shape[1] in (1, 3) and shape[2] == shape[3] > 4


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"
