"""Batches whose order is a function of (seed, step)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bilevel.data import ArrayDataset, JoinedData, Loader, MixedLoader, RowView, evaluation_batches, rows_hash
from bilevel.types import UserError


class Recording(ArrayDataset):
    """Remembers what was gathered."""

    def __init__(self, size: int):
        super().__init__({"x": np.arange(size) * 10}, name="the data")
        self.gathered: list[np.ndarray] = []

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.gathered.append(indices)
        return super().rows(indices)


def loader(size: int, batch_size: int, **options: Any) -> Loader:
    return Loader(Recording(size), batch_size, **{"seed": 0, **options})


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (7, 3), (7, 7), (1000, 64), (5003, 512)])
def test_every_row_once_an_epoch(size: int, batch_size: int):
    data = loader(size, batch_size)
    epochs = 3
    stream = np.concatenate([data.indices(step) for step in range(-(-epochs * size // batch_size))])[: epochs * size]
    orders = stream.reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (epochs, 1)))
    if size >= 1000:
        assert np.count_nonzero(orders[0] == orders[1]) < 10


def test_batch_is_a_function_of_seed_and_step():
    forward = [loader(5003, 500).indices(step) for step in range(30)]
    data = loader(5003, 500)
    for step in (29, 3, 11, 11, 0):
        np.testing.assert_array_equal(data.indices(step), forward[step])
        np.testing.assert_array_equal(data.batch(step)["id"], forward[step])
        np.testing.assert_array_equal(data.batch(step)["x"], forward[step] * 10)
    assert (loader(5003, 500, seed=1).indices(0) != forward[0]).any()


def test_order_does_not_depend_on_the_batch_size():
    small, large = loader(5003, 100), loader(5003, 400)
    np.testing.assert_array_equal(np.concatenate([small.indices(step) for step in range(4, 8)]), large.indices(1))


@pytest.mark.parametrize("size", [100, 5003])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_slices_of_the_processes_make_up_the_batch(size: int, count: int):
    whole = loader(size, 60)
    parts = [loader(size, 60, process_index=index, process_count=count) for index in range(count)]
    for step in (0, 1, 2, 83, 84, 1_000_000):  # ends of epochs among them
        expected = whole.batch(step)
        slices = [part.batch(step) for part in parts]
        for key, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([piece[key] for piece in slices]), array)
        for part in parts:
            np.testing.assert_array_equal(part.indices(step), whole.indices(step))
    for part in parts:
        assert isinstance(part.dataset, Recording)
        assert {len(indices) for indices in part.dataset.gathered} == {60 // count}


def test_late_steps_are_as_quick_as_early_ones():
    data = loader(5003, 500)
    assert data.batch(10**12)["id"].shape == (500,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 11},
            "batch of 11 rows cannot be drawn from the data, which has 10 rows; use .* at most 10",
        ),
        ({"batch_size": 0}, "batch size is 0; it must be at least 1"),
        (
            {"batch_size": 8, "process_count": 3},
            "batch of 8 rows of the data cannot be divided among 3 processes; use",
        ),
        ({"batch_size": 8, "process_count": 0}, "divided among 0 processes"),
        ({"batch_size": 8, "process_count": 2, "process_index": 2}, "process index is 2; it must be 0 to 1"),
        ({"batch_size": 8, "seed": -1}, "seed is -1; it must not be negative"),
    ],
)
def test_bad_arguments(options: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        loader(10, **options)


def test_negative_step():
    with pytest.raises(ValueError, match="step is -1"):
        loader(10, 2).indices(-1)


def collect(size: int, batch_size: int, limit: int | None = None) -> tuple[list[int], list[dict[str, np.ndarray]]]:
    batches = list(evaluation_batches(Recording(size), batch_size, limit))
    real = [batch["id"][batch["mask"] == 1] for batch in batches]
    return np.concatenate(real).tolist(), batches


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_sees_every_row_once(size: int, batch_size: int):
    rows, batches = collect(size, batch_size)
    assert rows == list(range(size))
    for batch in batches:
        assert set(batch) == {"x", "id", "mask"}
        assert {array.shape for array in batch.values()} == {(batch_size,)}
        assert batch["mask"].dtype == np.float32
    assert len(batches) == -(-size // batch_size)


def test_evaluation_limit_is_spread_over_the_data():
    assert collect(10, 4, limit=5)[0] == [0, 2, 4, 6, 8]
    assert collect(10, 4, limit=10)[0] == collect(10, 4, limit=99)[0] == list(range(10))
    assert collect(10, 4, limit=1)[0] == [0]


def test_evaluation_bad_arguments():
    with pytest.raises(UserError, match="batch size is 0"):
        evaluation_batches(Recording(3), 0)
    with pytest.raises(UserError, match="limit of rows to evaluate on the data is 0; it must be at least 1"):
        evaluation_batches(Recording(3), 2, limit=0)
    with pytest.raises(UserError, match="'mask' is taken by the padding mask; rename"):
        evaluation_batches(ArrayDataset({"mask": np.zeros(3)}), 2)


def test_mixed_batches_hold_rows_of_both():
    first = Loader(ArrayDataset({"x": np.arange(50)}, name="first"), 3, seed=0)
    second = Loader(ArrayDataset({"x": np.arange(100, 120)}, name="second"), 2, seed=1)
    mixed = MixedLoader(first, second)
    assert mixed.batch_size == 5
    for step in (7, 0, 7):
        batch = mixed.batch(step)
        np.testing.assert_array_equal(batch["x"], [*first.batch(step)["x"], *second.batch(step)["x"]])
        np.testing.assert_array_equal(batch["id"], [*first.batch(step)["id"], -1, -1])
        held = mixed.dataset.rows(mixed.indices(step))
        assert held.keys() == batch.keys()
        for name, rows in batch.items():
            np.testing.assert_array_equal(held[name], rows, strict=True)
    assert len(mixed.dataset) == 70


@pytest.mark.parametrize("count", [2, 4])
def test_mixed_batches_of_all_processes_are_that_of_one(count: int):
    def mixed(index: int, count: int) -> MixedLoader:
        where: Any = {"process_index": index, "process_count": count}
        first = Loader(ArrayDataset({"x": np.arange(50)}, name="first"), 12, seed=0, **where)
        second = Loader(ArrayDataset({"x": np.arange(100, 120)}, name="second"), 4, seed=1, **where)
        return MixedLoader(first, second)

    whole, parts = mixed(0, 1), [mixed(i, count) for i in range(count)]
    for step in (3, 0):
        for name, rows in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), rows)
    with pytest.raises(UserError, match=r"for process 0 of 2, the other for 1 of 2"):
        MixedLoader(mixed(0, 2).first, mixed(1, 2).second)


def test_mixed_data_have_the_same_arrays():
    second = Loader(ArrayDataset({"x": np.arange(9), "y": np.arange(9)}, name="more"), 2, seed=0)
    with pytest.raises(UserError, match="more"):
        MixedLoader(loader(9, 2), second)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (np.arange(9) > 5, r"are bool \[9\], not integers \[n\]: give np.flatnonzero"),
        (np.asarray([1.9, 2.9]), r"are float64 \[2\], not integers \[n\]: give row numbers"),
        (np.zeros((2, 2), int), r"are int64 \[2, 2\]"),
        (np.asarray([0, 9]), "lie between 0 and 9: give numbers from 0 to 8"),
        (np.asarray([-1, 3]), "lie between -1 and 3"),
    ],
)
def test_positions_that_are_no_row_numbers_are_refused(positions: np.ndarray, words: str):
    with pytest.raises(UserError, match=words):
        RowView(Recording(9), positions)


def test_the_hash_of_the_rows_of_a_view():
    data = Recording(9)
    views = [RowView(data, np.asarray(rows)) for rows in ([0, 1, 2], [2, 1, 0], [3, 4, 5])]
    assert rows_hash(data) == data.content_hash
    assert len({rows_hash(x) for x in [data, *views, RowView(views[0], np.arange(2))]}) == 5
    assert rows_hash(views[0]) == rows_hash(RowView(Recording(9), np.arange(3)))
    assert {x.content_hash for x in views} == {data.content_hash}, "what is kept by id holds for all views"
    joined = [JoinedData({"one": view, "two": data}) for view in views[:2]]
    assert rows_hash(joined[0]) != rows_hash(joined[1])
    assert rows_hash(JoinedData({"one": data})) == JoinedData({"one": data}).content_hash
