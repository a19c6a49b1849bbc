"""Sentences that stand in two sets of pairs: what a model is tested on should not be what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.data.pairs.packed_pairs import PackedPairs
from bilevel.data.shared import in_both, warn_of_shared


def pairs_in_both(first: PackedPairs, second: PackedPairs) -> NDArray[np.bool_]:
    """Say which rows of `second` have a source sentence that also stands in `first`, character for character.

    Returns:
        bool `[rows of second]`. A 64-bit hash decides.
    """
    return in_both(first, second)


def warn_of_shared_pairs(learned_from: Sequence[PackedPairs], tested: Mapping[str, PackedPairs]) -> None:
    """Say how many source sentences of valid and test sets stand in what is learned from; process 0 does.

    `pairs_without` removes them from a source before it is packed.
    """
    warn_of_shared(learned_from, tested, "sentences")
