"""One row of each group: who wins in a group, which groups are kept, and what follows when there are too few."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from scipy import stats

import bilevel
from bilevel.selection import filters
from bilevel.types import UserError

GROUPS = np.array([7, -2, 7, 5, 7, -2, 9, 5])
LOGITS = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 0.2, 3.0, -np.inf], np.float32)
DRAWS = 6000


def draws(k: int) -> np.ndarray:
    rule = filters.one_of_group()
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: rule.select(key, jnp.asarray(LOGITS), k, jnp.asarray(GROUPS))))
    return np.asarray(draw(keys))


@pytest.mark.parametrize("k", [2, 4])
def test_rows_win_by_their_logits_and_groups_by_chance(k: int) -> None:
    rows = draws(k)
    of = GROUPS[rows]
    assert all(len(set(line)) == k for line in of.tolist()), "one row of each group"
    counts = np.bincount(rows.ravel(), minlength=len(GROUPS))
    assert counts[7] == 0
    expected = np.zeros(len(GROUPS))
    for group in np.unique(GROUPS):
        inside = np.flatnonzero(np.equal(GROUPS, group))
        weights = np.exp(LOGITS[inside].astype(float))
        expected[inside] = DRAWS * k / 4 * weights / weights.sum()
        total = counts[inside].sum()  # drawn without replacement: narrower than a binomial's spread
        assert abs(total - DRAWS * k / 4) <= 4.5 * np.sqrt(DRAWS * k / 4 * (1 - k / 4))
        if len(inside) > 1:
            kept = weights > 0
            by_weight = total * (weights / weights.sum())[kept]
            if kept.sum() > 1:
                assert stats.chisquare(counts[inside][kept], by_weight).pvalue > 1e-3
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(DRAWS / 4))


def test_pairs_of_groups_are_equally_likely() -> None:
    of = np.sort(GROUPS[draws(2)], axis=1)
    _, counts = np.unique(of, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_losers_follow_where_groups_are_too_few() -> None:
    rows = draws(8)
    assert (np.sort(rows, axis=1) == np.arange(8)).all()
    assert all(len(set(line)) == 4 for line in GROUPS[rows[:, :4]].tolist())
    assert (rows[:, 7] == 7).all(), "a row without a score comes last"
    third = np.bincount(rows[:, 4], minlength=8) / DRAWS
    assert third[5] + third[1] > third[3], "higher logits first"


def test_a_group_without_any_score_comes_last() -> None:
    logits = jnp.asarray([jnp.nan, jnp.inf, 0.0, 1.0])
    rows = filters.one_of_group().select(jax.random.key(0), logits, 4, jnp.asarray([1, 1, 2, 2]))
    assert int(rows[0]) in (2, 3)
    assert set(rows[2:].tolist()) == {0, 1}


def test_local_groups_and_a_temperature() -> None:
    rule = filters.one_of_group(temperature=2.0, scope="local", shards=2)
    assert rule.temperature(jnp.asarray(LOGITS)) == 2
    members = jnp.asarray([1, 1, 2, 2, 1, 1, 2, 2])
    for seed in range(5):
        rows = rule.select(jax.random.key(seed), jnp.zeros(8), 4, members)
        assert [sorted(members[part].tolist()) for part in (rows[:2], rows[2:])] == [[1, 2], [1, 2]]
        assert (rows[:2] < 4).all()
        assert (rows[2:] >= 4).all()


@pytest.mark.parametrize("axis", [False, True])
def test_in_the_sparse_step(axis: bool) -> None:
    """`dds()` on one row a target; over a mapped axis a target may lie on several devices."""
    options: dict[str, Any] = {"filter": filters.one_of_group(), "batch_size": 4, "update_every": 1}
    if axis:
        options["axis_name"] = "devices"
    train = bilevel.make_step(
        toy.loss, lambda p, batch: batch["x"] @ p["w"], optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(), **options
    )
    big = {**toy.arrays(1, 8), "group": jnp.asarray([3, 3, 4, 4, 3, 5, 6, 6])}
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(1))
    spread: Any = train.step
    if axis:
        mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        rows = {"selected": spec("devices")}

        def over_devices(state: Any, big: Any, specific: Any) -> Any:
            def own(state: Any, big: Any, specific: Any) -> Any:
                state, metrics = train.step(state, big, specific)
                return state, {"selected": metrics["selected"]}

            return jax.shard_map(
                own, mesh=mesh, in_specs=(spec(), spec("devices"), spec("devices")), out_specs=(spec(), rows),
                check_vma=False,
            )(state, big, specific)  # fmt: skip

        spread = over_devices

    step = jax.jit(spread)
    for _ in range(5):
        before = state.weight_params["w"]
        state, metrics = step(state, big, toy.arrays(2, 4))
        assert sorted(big["group"][metrics["selected"]].tolist()) == [3, 4, 5, 6]
        assert (state.weight_params["w"] != before).any()
    with pytest.raises(UserError, match=r"needs the array 'group' in the big batch, which has: x, y"):
        jax.eval_shape(step, state, toy.arrays(1, 8), toy.arrays(2, 4))
