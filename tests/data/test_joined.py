"""Several data sets as one, and batches from one of them each."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.data import ArrayDataset, JoinedData, Loader, MixedData, RowView, TaskLoader
from bilevel.types import UserError

SIZES = {"a": 10, "b": 1, "c": 25}


def part(first: int, size: int) -> ArrayDataset:
    values = np.arange(first, first + size, dtype=np.int32)
    return ArrayDataset({"x": values, "y": np.stack([values, -values], axis=1)}, name=f"from {first}")


def joined() -> JoinedData:
    return JoinedData({name: part(1000 * i, size) for i, (name, size) in enumerate(SIZES.items())})


def test_rows_of_all_parts() -> None:
    data = joined()
    assert (len(data), data.name) == (36, "a + b + c")
    x = np.concatenate([np.arange(10), [1000], np.arange(2000, 2025)])
    for indices in (np.arange(36), np.array([35, 0, 10, 10, 9, 11]), np.zeros(0, np.int64)):
        batch = data.rows(indices)
        np.testing.assert_array_equal(batch["x"], x[indices])
        np.testing.assert_array_equal(batch["y"], np.stack([x, -x], axis=1)[indices])
        np.testing.assert_array_equal(batch["id"], indices)
        assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(("x", "y", "id"), np.int32)


def test_hash_depends_on_parts_and_order() -> None:
    one, other = part(0, 5), part(5, 5)
    hashes = [
        JoinedData(dict(enumerate_names(p))).content_hash for p in ([one, other], [other, one], [one], [one, other])
    ]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3


def enumerate_names(parts: list[ArrayDataset]) -> list[tuple[str, ArrayDataset]]:
    return [(str(i), part) for i, part in enumerate(parts)]


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="no data sets to join"):
        JoinedData({})
    with pytest.raises(UserError, match=r"a and b cannot be joined.*x int32\[\].*x float32\[2\]"):
        JoinedData(
            {"a": ArrayDataset({"x": np.zeros(3, np.int32)}), "b": ArrayDataset({"x": np.zeros((3, 2), np.float32)})}
        )


def tasks(weights: list[float] | None = None, **options: int) -> TaskLoader:
    data = JoinedData({name: part(1000 * i, 50 + i) for i, name in enumerate("abc")})
    return TaskLoader(data, 8, weights=weights, **{"seed": 0, **options})


def test_a_batch_is_that_of_one_task() -> None:
    loader = tasks()
    assert loader.batch_size == 8
    for step in (5, 0, 99, 5):
        task = loader.task(step)
        expected = Loader(part(1000 * task, 50 + task), 8, seed=0).batch(step)
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch["x"], expected["x"])
        np.testing.assert_array_equal(batch["x"] // 1000, task)
        np.testing.assert_array_equal(batch["id"], loader.indices(step))
        np.testing.assert_array_equal(loader.dataset.rows(loader.indices(step))["x"], batch["x"])
        assert batch["id"].dtype == np.int32


def test_tasks_are_a_function_of_seed_and_step() -> None:
    chosen = [tasks().task(step) for step in range(40)]
    loader = tasks()
    assert [loader.task(step) for step in reversed(range(40))] == chosen[::-1]
    assert [tasks(seed=1).task(step) for step in range(40)] != chosen


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0, 1, 0], [1, 1, 0]])
def test_frequencies_match_the_weights(weights: list[float] | None) -> None:
    loader, count = tasks(weights), 4000
    found = np.bincount([loader.task(step) for step in range(count)], minlength=3)
    chances = np.asarray(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    np.testing.assert_array_less(np.abs(found - count * chances), 1e-9 + 4.5 * np.sqrt(count * chances * (1 - chances)))


def test_slices_of_the_processes_make_up_the_batch() -> None:
    pieces = [tasks(process_index=i, process_count=2) for i in range(2)]
    for step in range(10):
        expected = tasks().batch(step)
        for name, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([piece.batch(step)[name] for piece in pieces]), array)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"The task weights are .* for 3 data sets \(a, b, c\)"):
        tasks(weights)


def test_a_small_task_is_named() -> None:
    with pytest.raises(UserError, match="batch of 5 rows cannot be drawn from from 1000, which has 1 rows"):
        TaskLoader(joined(), 5, seed=0)


def test_rows_mixed_in_are_drawn_like_the_others_and_have_no_id() -> None:
    """An epoch has every row once, whichever process reads it; only rows of the first set keep their id."""
    whole = part(0, 12)
    data = MixedData(RowView(whole, np.array([3, 1, 11, 8])), part(1000, 5), part(2000, 3))
    values, ids = [3, 1, 11, 8, *range(1000, 1005), *range(2000, 2003)], [3, 1, 11, 8, *[-1] * 8]
    batch = data.rows(np.arange(12))
    assert (batch["x"].tolist(), batch["id"].tolist()) == (values, ids)
    for processes in (1, 2):
        loaders = [Loader(data, 4, seed=0, process_index=i, process_count=processes) for i in range(processes)]
        batches = [loader.batch(step) for step in range(6) for loader in loaders]
        for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
            drawn = {int(x): int(i) for b in epoch for x, i in zip(b["x"], b["id"], strict=True)}
            assert drawn == dict(zip(values, ids, strict=True))
    with pytest.raises(UserError, match=r"from 0 and from 7 \(mixed in, 1 of 1\) cannot be joined"):
        MixedData(part(0, 2), ArrayDataset({"x": np.zeros(2, np.int32)}, name="from 7"))
