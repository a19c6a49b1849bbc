"""Rows that stand in two data sets: what a model is tested on should not be what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset
from bilevel.devices.processes import say
from bilevel.types import UserError

LEAST_BYTES = 32
"""Shorter rows (a title, a date) may well be equal by chance."""
WORTH_A_WARNING = 0.001
"""Share of the rows of a valid or test set that may be in what is learned from before the user is told."""
_CHUNK = 1 << 16


def rows_in_both(first: Dataset, second: Dataset) -> NDArray[np.bool_]:
    """Say which rows of `second` also stand in `first`, byte for byte.

    As documents are cut from their beginnings, the rows of a document that is in both are equal. Reads `first` once and keeps
    8 bytes for each row of `second`; a 64-bit hash decides, so that a wrong answer has a chance of (rows × rows)/2⁶⁴.

    Args:
        first: packed text, the larger; rows have tokens `[T]` and a length.
        second: packed text with the same T.

    Returns:
        bool `[rows of second]`; False for rows of fewer than 32 bytes.

    Raises:
        UserError: their rows have other lengths, and no two would be equal.
    """
    lengths = [data.rows(np.arange(1))["tokens"].shape[1] for data in (first, second) if len(data)]
    if len(set(lengths)) > 1:
        raise UserError(
            f"The rows of {first.name} have {lengths[0]} bytes, those of {second.name} {lengths[1]}: pack both with one length."
        )
    wanted = np.concatenate([_hashes(second, start) for start in range(0, len(second), _CHUNK)])
    known = np.unique(wanted[wanted != 0])
    found = np.zeros(len(known), bool)
    for start in range(0, len(first), _CHUNK):
        hashes = _hashes(first, start)
        places = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
        if len(known):
            found[places[known[places] == hashes]] = True
    return np.isin(wanted, known[found])


def warn_of_overlap(learned_from: Sequence[Dataset], tested: Mapping[str, Dataset]) -> None:
    """Say how many rows of the sets "valid" and "test" stand in what is learned from, word for word; process 0 does."""
    pairs = [(learned, name) for name in tested for learned in learned_from]
    for learned, name in pairs if jax.process_index() == 0 else ():
        shared = rows_in_both(learned, tested[name])
        if shared.mean() >= WORTH_A_WARNING:
            say(
                f"warning: {shared.sum():,} of {len(shared):,} rows of {tested[name].name} are also in {learned.name}: "
                f"remove those documents from one of the two, or the {name} loss is too good."
            )


def _hashes(data: Dataset, start: int) -> NDArray[np.uint64]:
    """uint64 `[rows]` of a chunk; 0 for rows that are too short."""
    rows = data.rows(np.arange(start, min(start + _CHUNK, len(data))))
    tokens = np.ascontiguousarray(rows["tokens"]).view(np.uint8)
    padded = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % 8)))
    words = padded.view(np.uint64)
    odd = np.random.default_rng(0).integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = words * odd
    mixed ^= mixed >> np.uint64(29)  # the product alone would keep low bits apart from high ones
    hashes = (mixed * odd[::-1]).sum(axis=1, dtype=np.uint64)
    return np.where(rows.get("size", rows["length"]) >= LEAST_BYTES, hashes | np.uint64(1), np.uint64(0))
