"""What stands in two sets: a model should not be tested on what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data.text.overlap import WORTH_A_WARNING
from bilevel.devices.processes import say


class Hashed(Protocol):
    """A packed set with a hash of each row."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def hash(self) -> NDArray[np.uint64]:
        """uint64 `[N]`: equal for rows that count as the same."""
        ...


def in_both(first: Hashed, second: Hashed) -> NDArray[np.bool_]:
    """Say which rows of `second` have a hash that a row of `first` has, bool `[rows of second]`."""
    return np.isin(np.asarray(second.hash), np.asarray(first.hash))


def warn_of_shared(learned_from: Sequence[Hashed], tested: Mapping[str, Hashed], unit: str) -> None:
    """Say how many rows of valid and test sets stand in what is learned from; process 0 does.

    Args:
        learned_from: sets to train on, or to learn weights from.
        tested: sets to measure on, by name.
        unit: what the rows are, in the plural.
    """
    for name, data in tested.items() if jax.process_index() == 0 else ():
        for learned in learned_from:
            shared = in_both(learned, data)
            if shared.mean() >= WORTH_A_WARNING:
                say(
                    f"warning: {shared.sum():,} of {len(shared):,} {unit} of {data.name} are also in {learned.name}: remove them "
                    f"from one of the two, or the {name} loss is too good."
                )
