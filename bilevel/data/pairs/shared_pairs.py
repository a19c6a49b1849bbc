"""Sentences that stand in two sets of pairs: what a model is tested on should not be what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data.pairs.packed_pairs import PackedPairs
from bilevel.data.text.overlap import WORTH_A_WARNING
from bilevel.devices.processes import say


def pairs_in_both(first: PackedPairs, second: PackedPairs) -> NDArray[np.bool_]:
    """Say which rows of `second` have a source sentence that also stands in `first`, character for character.

    Returns:
        bool `[rows of second]`. A 64-bit hash decides.
    """
    return np.isin(np.asarray(second.hash), np.asarray(first.hash))


def warn_of_shared_pairs(learned_from: Sequence[PackedPairs], tested: Mapping[str, PackedPairs]) -> None:
    """Say how many source sentences of valid and test sets stand in what is learned from; process 0 does.

    `pairs_without` removes them from a source before it is packed.
    """
    for name, data in tested.items() if jax.process_index() == 0 else ():
        for learned in learned_from:
            shared = pairs_in_both(learned, data)
            if shared.mean() >= WORTH_A_WARNING:
                say(
                    f"warning: {shared.sum():,} of {len(shared):,} sentences of {data.name} are also in {learned.name}: remove "
                    f"them from one of the two, or the {name} loss is too good."
                )
