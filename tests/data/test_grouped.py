"""Batches of whole groups, and the row that stands for what a group lacks."""

from typing import Any

import numpy as np
import pytest

from bilevel.data import ArrayDataset, GroupedData, GroupLoader
from bilevel.types import UserError

TABLE = np.array([[4, -1, 0], [-1, 2, -1], [1, 3, 5], [-1, -1, 6], [7, 8, -1]], np.int32)
VALUES = np.arange(9) * 10


def grouped(**more: Any) -> GroupedData:
    return GroupedData(ArrayDataset({"x": VALUES, **more}, name="rows"), TABLE)


def test_rows_know_their_group() -> None:
    batch = grouped().rows(np.array([4, 9, 3, -1, 8]))
    assert batch["x"].tolist() == [40, 0, 30, 0, 80]
    assert batch["id"].tolist() == [4, -1, 3, -1, 8]
    assert batch["group"].tolist() == [0, -1, 2, -1, 4]
    assert {str(batch[name].dtype) for name in ("id", "group")} == {"int32"}
    with pytest.raises(UserError, match="the name 'group' is taken"):
        grouped(group=VALUES)


def test_batches_are_whole_groups() -> None:
    """Every epoch has each group once; the slices of two processes are the batch of one."""
    loader = GroupLoader(grouped(), 2, seed=3)
    parts = [GroupLoader(grouped(), 2, seed=3, process_index=i, process_count=2) for i in (0, 1)]
    seen = []
    for step in range(5):
        batch = loader.batch(step)
        numbers = loader.indices(step)
        assert loader.batch_size == len(numbers) == 6
        for name, whole in batch.items():
            np.testing.assert_array_equal(grouped().rows(numbers)[name], whole)
            np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), whole)
        for cells in batch["id"].reshape(2, 3):
            (line,) = [i for i, row in enumerate(TABLE) if (row == cells).all()]
            seen.append(line)
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]
    assert grouped().mean_rows(6) == 2 * 9 / 5
