"""The keyed permutation: a bijection that looks uniform."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from bilevel.data import permute

SIZES = [1, 2, 3, 7, 1000, 1 << 10, 4096, 4097, 1 << 13, (1 << 13) + 1, 12345, 100_003]


def whole(size: int, *key: int) -> np.ndarray:
    return permute(np.arange(size), size, *key)


@pytest.mark.parametrize("size", SIZES)
def test_bijection(size: int):
    for key in ((0, 0), (0, 1), (12345678901234567890, 3)):
        permuted = whole(size, *key)
        assert permuted.dtype == np.int64
        np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


@pytest.mark.parametrize("size", [7, 12345])
def test_any_positions_give_the_same_answers(size: int):
    positions = np.random.default_rng(0).integers(0, size, 1000)
    np.testing.assert_array_equal(permute(positions, size, 5, 6), whole(size, 5, 6)[positions])
    assert len(permute(positions[:0], size, 5, 6)) == 0


@pytest.mark.parametrize("size", [1000, 12345])
def test_keys_give_unrelated_permutations(size: int):
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0)]
    for first, second in itertools.combinations(keys, 2):
        equal = np.count_nonzero(whole(size, *first) == whole(size, *second))
        assert equal <= 8  # Poisson with mean 1
        assert abs(np.corrcoef(whole(size, *first), whole(size, *second))[0, 1]) < 4.5 / np.sqrt(size)


def test_very_small_permutations_are_all_equally_likely():
    counts = Counter(tuple(whole(3, seed, 0).tolist()) for seed in range(3000))
    assert len(counts) == 6
    assert chi_square(np.array(list(counts.values()))) < 20.5  # 99.9 % of chi-square with 5 degrees


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.mark.parametrize("size", [4097, 8192, 12345, 100_003])
def test_where_a_position_goes_is_uniform(size: int):
    # 20 positions, among them neighbours and powers of 2, under 400 keys; where they land, in 16 equal cells.
    positions = np.array([*range(10), *(1 << np.arange(10)) + 1000]) % size
    landed = np.stack([permute(positions, size, seed, 7) for seed in range(400)])
    for column in landed.T:
        assert chi_square(np.bincount(column * 16 // size, minlength=16)) < 45  # 1e-4 of 15 degrees, 20 columns
    assert chi_square(np.bincount(landed.ravel() * 16 // size, minlength=16)) < 38


@pytest.mark.parametrize("size", [4097, 12345, 100_003])
def test_neighbours_part(size: int):
    # The joint cell of the images of neighbours is uniform, and steps are neither small nor regular.
    permuted = whole(size, 3, 1)
    cells = permuted * 8 // size
    joint = np.bincount(cells[:-1] * 8 + cells[1:], minlength=64)
    assert chi_square(joint) < 120  # 63 degrees
    steps = np.diff(permuted) % size
    assert chi_square(np.bincount(steps * 16 // size, minlength=16)) < 45


def test_a_huge_set_needs_no_memory():
    size = 2**31 - 1
    permuted = permute(np.arange(1000), size, 0, 0)
    assert len(set(permuted.tolist())) == 1000
    assert 0 <= permuted.min() < permuted.max() < size
    assert 0.4 < permuted.mean() / size < 0.6
