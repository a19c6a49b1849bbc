"""Wrong labels by the name of their kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from bilevel.data.labelled import corruption as faults
from bilevel.data.labelled.opening import LabelledData
from bilevel.types import UserError

Change: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def label_noise(
    kind: str,
    fraction: float | None,
    sets: LabelledData,
    *,
    seed: int,
    also_held_out: bool,
    confused: Callable[[], dict[int, int]],
) -> Change | None:
    """Return what makes labels wrong, for `LabelledData.transform`; None for no noise.

    Args:
      kind: none, uniform, pair, confused, or FILE.npz:NAME, recorded labels.
      fraction: share of labels that are replaced; None: 0.4, and 0.5 of the classes concerned with confused.
      sets: their training rows decide which classes there are.
      seed: of the draw.
      also_held_out: whether held-out rows are changed too, which recorded labels may not cover.
      confused: class -> the class that a model takes it for; called for that kind alone.

    Raises:
      UserError: an unknown kind, a fraction out of range, or recorded labels for rows of another part.
    """
    classes = sets.num_classes
    if kind == "none":
        return None
    if ":" in kind or kind.endswith(".npz"):
        path, _, name = kind.rpartition(":")
        if not path:
            raise UserError(f"--data.noise {kind} names no array: write FILE.npz:NAME.")
        if also_held_out and sets.has_valid_part:
            raise UserError(
                f"--data.noise {kind} holds labels of the training rows, but {sets.name} takes its held-out rows from a "
                "validation part of its own: omit --data.noisy-held-out."
            )
        return lambda arrays: faults.recorded_labels(arrays, path, name, num_classes=classes)
    share = (0.5 if kind == "confused" else 0.4) if fraction is None else fraction
    present = np.unique(sets.train.arrays["label"]).tolist()
    if kind == "uniform":
        return lambda arrays: faults.uniform_noise(arrays, share, num_classes=classes, seed=seed, among=present)
    if kind == "pair":
        pairs = dict(zip(present, present[1:] + present[:1], strict=True))
    elif kind == "confused":
        pairs = confused()
    else:
        raise UserError(f'--data.noise "{kind}" is unknown: give none, uniform, pair, confused or FILE.npz:NAME.')
    return lambda arrays: faults.pair_noise(arrays, pairs, fraction=share, seed=seed)
