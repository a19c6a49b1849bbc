"""Steps in two stages: the filter sees a part of the arrays, and the rows that it picks come in full afterwards."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel import trees
from bilevel.devices import sharding
from bilevel.selection import filters
from bilevel.types import Shared, UserError

STEPS, BIG, SMALL = 3, 32, 8
DDS, SOBA = bilevel.dds(average_specific=0.5), bilevel.soba(optax.sgd(0.05))


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    losses, aux = toy.loss(p, model_state, batch, rng)
    return losses * jnp.mean(batch["scale"].arrays), aux


def weighting(wp: Any, batch: Any) -> Any:
    return batch["small"] @ wp["w"][:2]


def big_batch(seed: int, rows: int = BIG) -> Any:
    batch = toy.arrays(seed, rows)
    ids = jnp.arange(rows, dtype=jnp.int32) + 100 * seed
    return {**batch, "small": batch["x"][:, :2], "id": ids, "scale": Shared(jnp.arange(3.0) + seed)}


def small(batch: Any) -> Any:
    return {name: batch[name] for name in ("small", "id")}


def build(**options: Any) -> Any:
    chosen = {"method": DDS, "update_every": 2, "batch_size": SMALL, **options}
    scorer = chosen.pop("weighting", weighting)
    train = bilevel.make_step(
        loss, scorer, optax.sgd(0.1, momentum=0.9), optax.adam(0.1), chosen.pop("method"), **chosen
    )
    return train, train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))


KINDS: dict[str, dict[str, Any]] = {
    "the rows of both gradients": {},
    "other rows of the α-gradient": {"alpha_batch": "uniform", "alpha_batch_size": 16},
    "a specific gradient that is reused": {"update_every": 1, "probe_every": 2, "method": SOBA, "micro_batches": 2},
    "weighted rows": {"filter": filters.importance(unbiased=True), "method": bilevel.frozen()},
    "weights of high entropy": {"filter": filters.gumbel_top_k(min_effective_fraction=0.5), "entropy_bonus": 0.1},
    "rows that are used up": {"max_uses": bilevel.MaxUses(250, 1), "alpha_batch_size": 16, "estimator": "score"},
    "rows without weights": {"method": bilevel.uniform(), "weighting": None, "filter": filters.uniform()},
    "nothing to choose": {"method": bilevel.uniform(), "weighting": None, "batch_size": BIG},
}


def both_ways(kind: str, compiled: Callable[[Any], Any]) -> Iterator[tuple[str, Any, Any]]:
    """Steps in one stage and in two: name -> what they find, of the state after the last step and of the metrics of all."""
    train, one = build(**KINDS[kind])
    _, two = build(**KINDS[kind])
    for i in range(STEPS):
        big, specific = big_batch(i), big_batch(50 + i, 8)
        one, expected = compiled(train.at(i))(one, big, specific)
        stages = train.stages_at(i)
        choice = compiled(stages.choose)(two, small(big))
        two, metrics = compiled(stages.step_on)(two, trees.take(big, choice.positions), specific, choice)
        assert metrics.keys() == expected.keys()
        yield from ((name, metrics[name], expected[name]) for name in expected)
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (two, one)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            yield jax.tree_util.keystr(path), a, b


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_operations_as_in_one_stage(kind: str) -> None:
    """Bit for bit, operation by operation: how a compiler puts them together is its own affair."""
    for name, found, wanted in both_ways(kind, lambda function: function):
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_the_same_compiled() -> None:
    for name, found, wanted in both_ways("the rows of both gradients", jax.jit):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_bit_for_bit_by_the_compiler_of_users() -> None:
    """The flags of the tests have it round otherwise in the two programs; its own do not."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_alpha_steps_ask_for_other_rows() -> None:
    train, state = build(**KINDS["other rows of the α-gradient"])
    sizes = [train.stages_at(i).choose(state, small(big_batch(0))).positions.shape[0] for i in (0, 1)]
    assert sizes == [SMALL + 16, SMALL]


def test_eight_devices_equal_one() -> None:
    mesh, big, specific = sharding.make_mesh(), big_batch(0), big_batch(50, 8)
    train, state = build(mesh=mesh)
    stages = train.stages_at(0)
    choice = jax.jit(stages.choose, out_shardings=sharding.replicated(mesh))(
        state, sharding.place_batch(mesh, small(big))
    )
    rows = sharding.place_batch(mesh, trees.take(big, choice.positions))
    found, _ = jax.jit(stages.step_on)(state, rows, sharding.place_batch(mesh, specific), choice)
    wanted, _ = jax.jit(build()[0].learn)(build()[1], big, specific)
    assert toy.relative_error((found.params, found.weight_params), (wanted.params, wanted.weight_params)) < 1e-5


def test_what_cannot_be_cut_in_two_is_refused() -> None:
    big = big_batch(0)
    train, state = build(weighting=lambda wp, batch: batch["x"] @ wp["w"])
    with pytest.raises(UserError, match=r"need the array 'x', which the small big batch has not \(it has: small, id\)"):
        train.stages_at(0).choose(state, small(big))
    train, state = build(mode="dense", batch_size=BIG)
    with pytest.raises(UserError, match='mode="dense" trains on all rows'):
        train.stages_at(0).choose(state, small(big))
    train, state = build(axis_name="data")
    with pytest.raises(UserError, match="axis_name='data' gives each device its own rows"):
        train.stages_at(0).choose(state, small(big))
    train, state = build()
    choice = train.stages_at(0).choose(state, small(big))
    with pytest.raises(UserError, match="step_on got 32 rows, but 8 were chosen"):
        train.stages_at(0).step_on(state, big, big, choice)


def test_wrappers_reach_both_stages_once() -> None:
    train, _ = build()
    wrapped: list[Any] = []
    mapped = train.map(lambda function: wrapped.append(function) or function)
    assert len(wrapped) == len(set(wrapped)) == 5  # step, plain, learn, and two of `step_on`
    assert mapped.stages.learn is mapped.stages.reuse or mapped.stages.learn == mapped.stages.reuse


if __name__ == "__main__":
    for each in KINDS:
        for name, found, wanted in both_ways(each, jax.jit):
            if name != "weight_entropy":  # of weights that are constants, where the compiler sees them
                np.testing.assert_array_equal(found, wanted, err_msg=f"{each}: {name}")
