"""Images that stand in two sets: what a model is tested on should not be what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.data.captions.packed_captions import PackedCaptions
from bilevel.data.shared import in_both, warn_of_shared


def images_in_both(first: PackedCaptions, second: PackedCaptions) -> NDArray[np.bool_]:
    """Say which rows of `second` have an image that also stands in `first`, pixel for pixel at the packed size.

    Returns:
        bool `[rows of second]`. A 64-bit hash decides.
    """
    return in_both(first, second)


def warn_of_shared_images(learned_from: Sequence[PackedCaptions], tested: Mapping[str, PackedCaptions]) -> None:
    """Say how many images of valid and test sets stand in what is learned from, whatever their captions; process 0 does."""
    warn_of_shared(learned_from, tested, "images")
