"""The samplers that learn nothing, and how often rows are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import samplers
from bilevel.types import UserError


def test_uniform_draws_each_row_once_an_epoch() -> None:
    rows, batch = 10, 4
    chosen = samplers.uniform(rows, batch)
    state, draw, found = chosen.init(jax.random.key(0)), jax.jit(chosen.draw), []
    for _ in range(15):  # 6 epochs
        drawn, state, metrics = draw(state)
        found.append(np.asarray(drawn))
        np.testing.assert_allclose(metrics["effective_sample_size"], rows, rtol=1e-5)
    epochs = np.concatenate(found).reshape(6, rows)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(rows), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_uniform_with_batches_that_end_with_the_epoch() -> None:
    chosen = samplers.uniform(4, 4)
    state, found = chosen.init(jax.random.key(1)), []
    for _ in range(3):
        drawn, state, _ = jax.jit(chosen.draw)(state)
        found.append(tuple(np.asarray(drawn)))
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in found)
    assert int(state.epoch) == 3


def test_replayed_begins_again_after_its_end() -> None:
    sequence = np.asarray([[0, 2], [1, 1]])
    chosen = samplers.replayed(sequence, 3)
    state, found = chosen.init(jax.random.key(0)), []
    for _ in range(3):
        drawn, state, _ = chosen.draw(state)
        found.append(np.asarray(drawn))
    np.testing.assert_array_equal(np.stack(found), sequence[[0, 1, 0]])


def test_frequencies() -> None:
    sequence = np.asarray([[0, 1, 1], [3, 1, 0], [5, -1, 3]])  # the last row has two that are no rows
    counts = samplers.row_counts(sequence, 5)
    np.testing.assert_array_equal(counts, [2, 3, 0, 2, 0])
    np.testing.assert_array_equal(samplers.class_counts(counts, [0, 1, 1, 0, 2], 4), [4, 3, 0, 0])
    found = samplers.frequencies(jnp.asarray([0, 10, 20, 30, 40]))
    np.testing.assert_allclose(found[:5], [0, 4, 20, 36, 40])
    np.testing.assert_allclose([found.least_deviation, found.most_deviation], [-1, 1])
    many = samplers.frequencies(jnp.asarray([3] * 898 + [653]))
    assert (float(many.least), float(many.most)) == (3, 653)


@pytest.mark.parametrize(
    ("sequence", "num_rows", "num_steps", "message"),
    [
        ([1, 2], 3, None, r"shape \(2,\)"),
        ([[0.5]], 3, None, "type float"),
        (np.zeros((0, 2), int), 3, None, r"shape \(0, 2\)"),
        ([[0, 3]], 3, None, "row numbers 0 to 3, but num_rows=3"),
        ([[0, -2]], 3, None, "row numbers -2 to 0"),
        ([[-1, 0]], 3, None, "row numbers -1 to 0"),
        ([[0, 1]], 3, 2, "has 1 steps, and 2 are asked for"),
    ],
)
def test_sequences_that_do_not_fit(sequence: object, num_rows: int, num_steps: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        samplers.replayed(sequence, num_rows, num_steps=num_steps)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="batch_size=4 rows cannot be drawn"):
        samplers.uniform(3, 4)
    with pytest.raises(UserError, match="num_rows=0"):
        samplers.uniform(0, 1)
    with pytest.raises(UserError, match="uniform has no parameters"):
        samplers.uniform(3, 2).init(jax.random.key(0), {"w": jnp.ones(1)})
