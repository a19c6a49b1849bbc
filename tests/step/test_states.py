"""What the state may hold besides floating-point arrays of its own: counters, random keys, arrays that optimizers keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.nn.adapters import nnx_loss
from bilevel.types import Array, LossAux, UserError

METHODS: dict[str, Any] = {"dds": bilevel.dds, "soba": lambda: bilevel.soba(optax.contrib.prodigy())}


def counting_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    """A loss whose model state has a mean, a counter and a random key."""
    key, _ = jax.random.split(model_state["key"])
    moved = {"mean": jnp.mean(batch["y"]), "count": model_state["count"] + 1, "key": key}
    return toy.loss(p, {}, batch, rng)[0], LossAux(moved, {})


def keeping_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    """A loss that leaves counter and key as they are, as that of an NNX module with dropout does."""
    losses, aux = counting_loss(p, model_state, batch, rng)
    return losses, aux._replace(model_state={**model_state, "mean": aux.model_state["mean"]})


def build(loss: Any = keeping_loss, **options: Any) -> tuple[bilevel.TrainStep, bilevel.TrainState]:
    train = bilevel.make_step(
        loss, toy.weighting, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(), batch_size=4, update_every=2, **options
    )
    model_state = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.uint32), "key": jax.random.key(7)}
    return train, train.init(jax.random.key(0), toy.params(1), toy.weight_params(2), model_state)


def types(state: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_counters_and_keys_move_once_a_step() -> None:
    train, state = build(counting_loss)
    wanted, key = types(state), jax.random.key(7)
    step = jax.jit(train.step, donate_argnums=0)
    for i in range(3):
        state, _ = step(state, toy.arrays(i, 12), toy.arrays(10 + i, 4))
        key = jax.random.split(key)[0]
    assert types(state) == wanted
    assert int(state.model_state["count"]) == 3
    np.testing.assert_array_equal(jax.random.key_data(state.model_state["key"]), jax.random.key_data(key))


AVERAGES: dict[str, dict[str, Any]] = {
    "micro_batches=2": {"micro_batches": 2},
    "ema_decay=0.9": {"ema_decay": 0.9},
    "axis_name='data'": {"axis_name": "data"},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_counters_and_keys_that_would_be_averaged_are_refused(average: str) -> None:
    train, state = build(counting_loss, **AVERAGES[average])
    rows, same = PartitionSpec("data"), PartitionSpec()
    step: Any = train.step
    if "axis_name" in AVERAGES[average]:
        mesh = sharding.make_mesh(jax.devices()[:2])
        step = jax.shard_map(lambda *a: train.step(*a)[0], mesh=mesh, in_specs=(same, rows, rows), out_specs=same)
    message = rf"changes the model state \['count'\], uint32, which is no statistic that {average} could average"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(step, state, toy.arrays(0, 12), toy.arrays(1, 4))


def test_an_nnx_module_with_dropout_is_averaged() -> None:
    """Its streams of random keys stay as they are."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.drop, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.drop(self.norm(x))

    graphdef, params, model_state = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    loss = nnx_loss(graphdef, lambda outputs, batch: outputs.sum(1), inputs="x")
    train = bilevel.make_step(
        loss, None, optax.sgd(0.1), None, bilevel.uniform(), batch_size=4, micro_batches=2, ema_decay=0.9
    )
    state = jax.eval_shape(lambda: train.init(jax.random.key(0), params, model_state=model_state))
    after, _ = jax.eval_shape(train.step, state, toy.arrays(0, 4), toy.arrays(1, 4))
    assert types(after) == types(state)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_counters_and_keys_that_stay_are_kept_by_averages(micro_batches: int) -> None:
    train, state = build(ema_decay=0.9, micro_batches=micro_batches)
    wanted = types(state)
    step = jax.jit(train.step, donate_argnums=0)
    for i in range(3):
        state, _ = step(state, toy.arrays(i, 12), toy.arrays(10 + i, 4))
    assert types(state) == wanted
    for found in (state.model_state, state.ema[1]):
        assert int(found["count"]) == 0
        np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(7)))
    assert 0 < abs(float(state.ema[1]["mean"])) < abs(float(state.model_state["mean"])) + 1


@pytest.mark.parametrize("check_vma", [False, True])
def test_mapped_axis_keeps_the_types_of_the_model_state(check_vma: bool) -> None:
    train, state = build(axis_name="data", ema_decay=0.9)
    rows, same = PartitionSpec("data"), PartitionSpec()
    specs: dict[str, Any] = {"in_specs": (same, rows, rows), "out_specs": same, "check_vma": check_vma}
    mesh = sharding.make_mesh(jax.devices()[:2])
    step = jax.jit(jax.shard_map(lambda *a: train.step(*a)[0], mesh=mesh, **specs))
    wanted = types(state)
    for i in range(2):
        state = step(state, toy.arrays(i, 12), toy.arrays(10 + i, 4))
    assert types(state) == wanted
    assert int(state.model_state["count"]) == 0
    np.testing.assert_array_equal(jax.random.key_data(state.model_state["key"]), jax.random.key_data(jax.random.key(7)))


@pytest.mark.parametrize("method", METHODS)
def test_optimizers_that_keep_the_first_parameters(method: str) -> None:
    train = bilevel.make_step(
        toy.loss, toy.weighting, optax.contrib.prodigy(), optax.contrib.prodigy(), METHODS[method](), batch_size=4
    )
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    state, _ = jax.jit(train.step, donate_argnums=0)(state, toy.arrays(0, 12), toy.arrays(1, 4))
    assert int(state.step) == 1
