"""A keyed pseudo-random permutation, evaluated only where it is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALL = 4096  # up to here the permutation is drawn outright, as few bits make a poor Feistel network
_ROUNDS = 8


def permute(positions: NDArray[np.integer[Any]], size: int, *key: int) -> NDArray[np.int64]:
    """Apply the permutation of 0 .. size-1 that belongs to `key`.

    A Feistel network on the smallest sufficient number of bits, with cycle walking: time and memory are
    proportional to the number of positions. Up to 4096 elements the permutation is drawn and indexed.

    Args:
        positions: integer `[b]`, each from 0 to `size - 1`.
        size: number of elements.
        *key: integers that are not negative, such as a seed and an epoch.

    Returns:
        int64 `[b]`.
    """
    sequence = np.random.SeedSequence(key)
    if size <= _SMALL:
        return np.random.Generator(np.random.Philox(sequence)).permutation(size)[positions]
    round_keys = sequence.generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    bits = (size - 1).bit_length()
    values = _feistel(positions.astype(np.uint64), bits, round_keys)
    # A network permutes all numbers of `bits` bits, fewer than twice `size`. Who lands outside walks on
    # along its cycle, which must come back inside; so the walk is a permutation of what is inside.
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, round_keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each round changes one half by a function of the other; halves may differ by one bit."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2:
            low = low ^ (_mix(high, key) & low_mask)
        else:
            high = high ^ (_mix(low, key) & high_mask)
    return (high << low_bits) | low


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 on values plus key: every output bit depends on every input bit."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
