"""A cap on how often rows are trained on, against counts by hand and against steps on the rows that are left."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel import MaxUses
from bilevel.devices import sharding
from bilevel.selection import filters
from bilevel.types import NOT_COMPUTED, UserError

ROWS, BIG, SMALL = 24, 12, 4


def batch_of(ids: Any, seed: int = 0) -> Any:
    rows = toy.arrays(seed, ROWS)
    return {**jax.tree.map(lambda x: x[jnp.maximum(jnp.asarray(ids), 0)], rows), "id": jnp.asarray(ids, jnp.int32)}


def build(method: Any = None, *, batch_size: int = SMALL, **options: Any) -> Any:
    train = bilevel.make_step(
        toy.loss,
        toy.weighting,
        optax.sgd(0.1),
        optax.sgd(0.1),
        method or bilevel.frozen(),
        batch_size=batch_size,
        **options,
    )
    return train, train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))


@pytest.mark.parametrize("rule", ["gumbel_top_k", "top_k", "top_fraction", "threshold"])
def test_no_row_is_trained_on_more_often(rule: str) -> None:
    """Two epochs more than there are rows for: then batches shrink, to nothing."""
    settings = {"top_fraction": (0.5,), "threshold": (0.0,)}.get(rule, ())
    train, state = build(filter=getattr(filters, rule)(*settings), max_uses=MaxUses(ROWS, 2))
    step, counted, sizes = jax.jit(train.plain), Counter[int](), []
    for i in range(16):
        ids = np.random.default_rng(i).permutation(ROWS)[:BIG]
        left = [int(row) for row in ids if counted[int(row)] < 2]
        before = state.params
        state, found = step(state, batch_of(ids), batch_of(np.arange(4), 50))
        trained = [int(row) for row in found["ids"] if row >= 0]
        assert len(set(trained)) == len(trained) == min(SMALL, len(left)) == SMALL - found["rows_left_out"]
        assert set(trained) <= set(left)
        counted.update(trained)
        weight = 1 / len(trained) if trained else 0
        np.testing.assert_allclose(sorted(found["weights"])[SMALL - len(trained) :], weight, rtol=1e-6)
        if trained:
            losses = toy.losses(before, batch_of(trained))
            np.testing.assert_allclose(found["generic_loss"], losses.mean(), rtol=1e-5)
        else:
            assert found["generic_loss"] == NOT_COMPUTED
            assert toy.relative_error(state.params, before) == 0
        sizes.append(len(trained))
    assert [counted[row] for row in range(ROWS)] == state.uses.tolist()
    assert sizes[0] == SMALL
    assert 0 < min(n for n in sizes if n) < SMALL
    assert sizes[-1] == 0


@pytest.mark.parametrize("estimator", ["softmax", "score"])
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_the_rows_that_are_left_teach_as_if_alone(estimator: Any, bonus: float) -> None:
    """θ and α of a step on four rows, one of them used up, are those of a step on the other three."""
    method, specific = bilevel.dds(), batch_of(np.arange(6), 50)
    options = {"estimator": estimator, "entropy_bonus": bonus, "derivatives": bilevel.Forward(), "update_every": 1}
    train, state = build(method, **options, max_uses=MaxUses(ROWS))
    state = state.replace(uses=state.uses.at[2].set(1))
    found, said = jax.jit(train.learn)(state, batch_of([0, 1, 2, 3]), specific)
    other, alone = build(method, batch_size=3, **options)
    wanted, _ = jax.jit(other.learn)(alone, batch_of([0, 1, 3]), specific)
    assert said["rows_left_out"] == 1
    assert found.uses.tolist()[:5] == [1, 1, 1, 1, 0]
    assert toy.relative_error(found.params, wanted.params) < 1e-6
    # The score estimator divides by b − 1, also where rows are left out.
    factor = 3 / 2 if estimator == "score" else 1.0
    moved, expected = (x.weight_params["w"] - toy.weight_params(2)["w"] for x in (found, wanted))
    assert toy.relative_error(moved * factor, expected) < 1e-5


def test_rows_without_a_number_are_never_used_up() -> None:
    train, state = build(max_uses=MaxUses(ROWS), filter=filters.top_k())
    step, ids = jax.jit(train.plain), [-1] * SMALL
    for _ in range(3):
        state, found = step(state, batch_of(ids), batch_of(np.arange(4), 50))
        assert found["rows_left_out"] == 0
    assert not state.uses.any()


@pytest.mark.parametrize("scope", ["global", "local"])
def test_eight_devices_count_as_one(scope: Any) -> None:
    """Under a mapped axis, where each device counts the rows of all."""
    mesh, ids = sharding.make_mesh(), np.arange(ROWS)
    specific, places = batch_of(np.arange(8), 50), jax.sharding.PartitionSpec

    def run(axis_name: str | None, rule: Any, wrap: Any) -> Any:
        train, state = build(batch_size=8, filter=rule, max_uses=MaxUses(ROWS), axis_name=axis_name)
        step = jax.jit(wrap(lambda *a: train.plain(*a)[0]))
        for _ in range(3):
            state = step(state, batch_of(ids), specific)
        return state

    def mapped(function: Any) -> Any:
        axis = mesh.axis_names[0]
        specs = (places(), places(axis), places(axis))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=places(), check_vma=False)

    one = run(None, filters.top_k(scope=scope, shards=8 if scope == "local" else 1), lambda f: f)
    eight = run(mesh.axis_names[0], filters.top_k(scope=scope), mapped)
    assert one.uses.tolist() == eight.uses.tolist() == [1] * ROWS
    assert toy.relative_error(eight.params, one.params) < 1e-5


def test_what_cannot_be_capped_is_refused() -> None:
    cap = MaxUses(ROWS)
    with pytest.raises(UserError, match=r"max_uses does not fit the filter importance"):
        build(filter=filters.importance(), max_uses=cap)
    with pytest.raises(UserError, match=r"max_uses counts the rows of each θ-update, which the halves do not see"):
        bilevel.make_halves(
            toy.loss, toy.weighting, optax.sgd(0.1), bilevel.soba(optax.sgd(0.1)), batch_size=SMALL, max_uses=cap
        )
    with pytest.raises(UserError, match=r'choose mode="sparse" and a method with a weighting network'):
        build(bilevel.dds(), mode="dense", max_uses=cap)
    train, state = build(max_uses=cap)
    with pytest.raises(UserError, match=r"counts by the array 'id' of the rows"):
        train.plain(state, toy.arrays(0, BIG), toy.arrays(1, 4))
    for wrong in ({"rows": 0}, {"rows": 3, "times": 0}, {"rows": 3, "times": 256}):
        with pytest.raises(UserError, match="must be"):
            MaxUses(**wrong)
