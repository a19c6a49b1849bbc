"""Random search: settings drawn from ranges, each a function of a key and the number of the trial."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class Log(NamedTuple):
    """A range that is drawn from, with a uniform logarithm."""

    low: float
    high: float


class Among(NamedTuple):
    """Values that are taken in a drawn order, each once before any comes again."""

    values: tuple[Any, ...]


Space: TypeAlias = Mapping[str, Log | Among]
"""Name of a setting -> its values."""


def drawn_settings(space: Space, key: Sequence[int], trial: int) -> dict[str, Any]:
    """Draw the settings of a trial, numbered from 1; they depend on the space, the key and the number alone."""
    rng = np.random.default_rng([*key, trial])
    drawn: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, Log):
            low, high = math.log(values.low), math.log(values.high)
            drawn[name] = float(f"{math.exp(rng.uniform(low, high)):.3g}")
        else:
            again, place = divmod(trial - 1, len(values.values))
            order = np.random.default_rng([*key, zlib.crc32(name.encode()), again]).permutation(len(values.values))
            drawn[name] = values.values[order[place]]
    return drawn
