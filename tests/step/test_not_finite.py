"""What is not finite: α stays where it is, no row is picked by it, and a metric says so."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import core
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.nn.adapters import linen_loss
from bilevel.types import NOT_COMPUTED, Array, LossAux

BIG, SMALL = 12, 4
METHODS: dict[str, Any] = {
    "dds": bilevel.dds,
    "dds averaged": lambda: bilevel.dds(average_specific=0.9),
    "anograd": lambda: bilevel.anograd(average_specific=0.9, through_optimizer=True),
    "soba": lambda: bilevel.soba(optax.adam(0.01)),
    "penalty": lambda: bilevel.penalty(optax.adam(0.01)),
    "implicit cg": lambda: bilevel.implicit_cg(damping=300.0, warm_start=True),
}


def build(method: Any, **options: Any) -> tuple[bilevel.TrainStep, bilevel.TrainState]:
    given: dict[str, Any] = {"loss": toy.loss, "optimizer": optax.adam(0.01), "batch_size": SMALL, "update_every": 1}
    given |= options
    loss, optimizer = given.pop("loss"), given.pop("optimizer")
    train = bilevel.make_step(loss, toy.weighting, optimizer, optax.adam(0.01), method, **given)
    return train, train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))


def batches(step: int) -> tuple[Any, Any]:
    return toy.arrays(step, BIG), toy.arrays(100 + step, 3)


def poisoned(batch: Any, name: str, row: int, value: float = np.nan) -> Any:
    return {**batch, name: batch[name].at[row].set(value)}


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("name", "value"), [*((name, np.nan) for name in METHODS), ("dds", np.inf)])
def test_a_specific_loss_that_is_not_finite_leaves_alpha_alone(name: str, value: float) -> None:
    """And the state of the method: the next good batch teaches as if the bad one had not been."""
    train, state = build(METHODS[name]())
    step = jax.jit(train.step)
    for i in range(3):
        state, metrics = step(state, *batches(i))
        assert metrics["alpha_skipped"] == 0
    before = state
    state, metrics = step(state, batches(3)[0], poisoned(batches(3)[1], "y", 1, value))
    assert metrics["alpha_skipped"] == 1
    assert not np.isfinite(metrics["specific_loss"])
    parts = ("weight_params", "weight_opt_state", "method_state")
    assert_equal(*([getattr(s, part) for part in parts] for s in (state, before)))
    assert toy.relative_error(state.params, before.params) > 0
    state, metrics = step(state, *batches(4))
    assert metrics["alpha_skipped"] == 0
    assert np.isfinite(toy.flat((state.weight_params, state.method_state))).all()
    assert toy.relative_error(state.weight_params, before.weight_params) > 0


@pytest.mark.parametrize("name", ["anograd", "soba", "implicit cg"])
def test_a_specific_gradient_that_is_not_finite_is_a_specific_loss_that_is_not(name: str) -> None:
    """√ has no derivative at 0, where the loss itself is finite."""

    def specific(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        return jnp.sqrt(0.0 * toy.losses(p, batch)), LossAux(model_state, {})

    train, before = build(METHODS[name](), specific_loss=specific)
    state, metrics = jax.jit(train.step)(before, *batches(0))
    assert np.isnan(metrics["specific_loss"])
    assert metrics["alpha_skipped"] == 1
    assert_equal(state.weight_params, before.weight_params)
    assert np.isfinite(toy.flat(state.params)).all()


def test_rows_of_the_alpha_gradient_alone() -> None:
    """A loss of NaN among them reaches neither α nor θ, which moves by other rows."""
    train, before = build(bilevel.dds(), alpha_batch="uniform", alpha_batch_size=BIG, filter=bilevel.filters.top_k())
    big, specific = batches(0)
    worst = int(jnp.argmin(toy.weighting(before.weight_params, big)))
    state, metrics = jax.jit(train.step)(before, poisoned(big, "y", worst), specific)
    wanted, _ = jax.jit(train.step)(before, big, specific)
    assert metrics["alpha_skipped"] == 1
    assert worst not in metrics["selected"]
    assert_equal(state.weight_params, before.weight_params)
    assert_equal(state.params, wanted.params)


def test_learning_to_reweight_falls_back_to_uniform_weights() -> None:
    train = bilevel.make_step(
        toy.loss, None, optax.sgd(0.01), None, bilevel.learning_to_reweight(), mode="dense", batch_size=BIG
    )
    state = train.init(jax.random.key(0), toy.params(1))
    state, metrics = jax.jit(train.step)(state, batches(0)[0], poisoned(batches(0)[1], "y", 1))
    assert metrics["alpha_skipped"] == 1
    np.testing.assert_allclose(metrics["weights"], 1 / BIG)
    assert np.isfinite(toy.flat(state.params)).all()


@pytest.mark.parametrize("check_vma", [False, True])
def test_one_device_with_a_bad_row_stops_all(check_vma: bool) -> None:
    train, before = build(bilevel.dds(), axis_name="data")
    rows, same = PartitionSpec("data"), PartitionSpec()
    names = ("alpha_skipped", "bad_logits", "bad_logit_row")

    def named(*arguments: Any) -> Any:
        state, metrics = train.step(*arguments)
        return state, {name: metrics[name] for name in names}

    step = jax.shard_map(
        named, mesh=sharding.make_mesh(jax.devices()[:2]), in_specs=(same, rows, rows), out_specs=same, check_vma=check_vma,
    )  # fmt: skip
    big, specific = batches(0)[0], poisoned(toy.arrays(100, 4), "y", 3)
    state, metrics = jax.jit(step)(before, big, specific)
    assert metrics["alpha_skipped"] == 1
    assert_equal(state.weight_params, before.weight_params)
    state, metrics = jax.jit(step)(before, poisoned(big, "x", 9), toy.arrays(100, 4))
    assert (int(metrics["alpha_skipped"]), int(metrics["bad_logits"]), int(metrics["bad_logit_row"])) == (0, 1, 9)
    assert toy.relative_error(state.weight_params, before.weight_params) > 0


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_whose_logit_is_not_finite_is_not_trained_on_and_named(value: float, ids: bool) -> None:
    train, state = build(bilevel.dds(), update_every=2, entropy_bonus=0.1)
    step = jax.jit(train.step)
    for i in range(4):
        big, specific = batches(i)
        big |= {"id": jnp.arange(500, 500 + BIG)} if ids else {}
        state, metrics = step(state, poisoned(big, "x", 7, value), specific)
        assert 7 not in metrics["selected"]
        assert metrics["bad_logits"] == 1
        assert metrics["bad_logit_row"] == (507 if ids else 7)
        assert 1 < metrics["effective_sample_size"] <= BIG - 1
        assert 0 < metrics["logit_rms"] < metrics["largest_logit"] < np.inf
        assert metrics["alpha_skipped"] in (0, NOT_COMPUTED)
    assert np.isfinite(toy.flat((state.params, state.weight_params))).all()
    _, metrics = step(state, *batches(9))
    assert (metrics["bad_logits"], metrics["bad_logit_row"]) == (0, -1)


@pytest.mark.parametrize(
    "filter", [bilevel.filters.importance(), bilevel.filters.gumbel_top_k(min_effective_fraction=0.5)]
)
def test_big_batches_without_any_logit(filter: Any) -> None:
    train, state = build(bilevel.frozen(), filter=filter)
    state = dataclasses.replace(state, weight_params=jax.tree.map(lambda x: x * jnp.nan, state.weight_params))
    _, metrics = jax.jit(train.step)(state, *batches(0))
    assert metrics["bad_logits"] == BIG
    assert metrics["effective_sample_size"] == NOT_COMPUTED
    assert all(0 <= i < BIG for i in metrics["selected"].tolist())


def test_dense_weights_of_rows_without_a_logit_are_zero() -> None:
    def weighting(wp: Any, batch: Any) -> Array:
        return jnp.where(batch["y"] > 0, toy.weighting(wp, batch), jnp.nan)

    train = bilevel.make_step(
        toy.loss, weighting, optax.sgd(0.01), optax.sgd(0.1), bilevel.dds(), mode="dense", batch_size=BIG
    )
    big, specific = batches(0)
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    state, metrics = jax.jit(train.step)(state, big, specific)
    kept = np.asarray(big["y"]) > 0
    logits = np.asarray(toy.weighting(toy.weight_params(2), big))
    wanted = np.where(kept, np.exp(logits), 0)
    np.testing.assert_allclose(metrics["weights"], wanted / wanted.sum(), rtol=1e-5)
    assert metrics["bad_logits"] == (~kept).sum() > 0
    assert np.isfinite(toy.flat(state.params)).all()


def masked(optimizer: Any) -> Any:
    """A pruning mask on half of the first layer, before the optimizer."""

    def mask(gradient: Any, _: Any) -> Any:
        kernel = gradient["first"]["kernel"]
        keep = (jnp.arange(kernel.size).reshape(kernel.shape) % 2).astype(kernel.dtype)
        return {**gradient, "first": {**gradient["first"], "kernel": kernel * keep}}

    return optax.chain(optax.stateless(mask), optimizer)


@pytest.mark.parametrize("method", [bilevel.dds, lambda: bilevel.anograd(through_optimizer=True)])
@pytest.mark.parametrize(
    "optimizer",
    [
        masked(optax.adam(0.05)),
        masked(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05))),
        optax.radam(0.05),
    ],
)
def test_optimizers_without_a_derivative_teach_all_the_same(optimizer: Any, method: Any) -> None:
    train, state = build(method(), optimizer=optimizer, derivatives=bilevel.Forward())
    step, metrics = jax.jit(train.step), {}
    for i in range(6):
        before = state.weight_params
        state, metrics = step(state, *batches(i))
        assert metrics["alpha_skipped"] == 0
        assert np.isfinite(metrics["alignment_rms"])
        assert toy.relative_error(state.weight_params, before) > 0
    assert metrics["alignment_rms"] > 1e-6


DEBUGGING = """
import json
import jax, jax.numpy as jnp, optax, toy
import bilevel

assert jax.config.jax_debug_nans
seen = {}
methods = {
    "uniform": bilevel.uniform(), "dds": bilevel.dds(average_specific=0.9), "reweight": bilevel.learning_to_reweight(),
    "spcl": bilevel.spcl(1e-9),
}
for name, method in methods.items():
    dense = method.chooses_weights
    train = bilevel.make_step(
        toy.loss, toy.weighting, optax.radam(0.01), optax.adam(0.01), method, batch_size=12 if dense else 4,
        mode="dense" if dense else "sparse", update_every=1 if dense else 2, probe_every=4 if name == "dds" else None,
    )
    state, step = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2)), jax.jit(train.step)
    for i in range(4):
        state, metrics = step(state, toy.arrays(i, 12), toy.arrays(50 + i, 3))
    seen[name] = {key: float(metrics[key]) for key in ("specific_loss", "alignment_rms", "effective_sample_size")}
try:
    bad = toy.arrays(9, 12)
    step(state, {**bad, "y": bad["y"] * jnp.inf}, {})
except FloatingPointError:
    seen["stopped"] = True
print(json.dumps(seen))
"""


def test_healthy_steps_pass_where_jax_stops_at_nan() -> None:
    environment = {**os.environ, "JAX_DEBUG_NANS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEBUGGING], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["stopped"], "an unhealthy step does not"
    assert seen["spcl"]["effective_sample_size"] == NOT_COMPUTED
    assert seen["dds"]["alignment_rms"] == seen["uniform"]["specific_loss"] == NOT_COMPUTED
    assert np.isfinite(seen["reweight"]["alignment_rms"])


@pytest.mark.parametrize("pace", [optax.constant_schedule(0.0), optax.linear_schedule(0.0, 1.0, 10)])
def test_spcl_at_a_pace_of_zero_takes_no_row(pace: Any) -> None:
    def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        return jnp.where(jnp.arange(BIG) % 2, toy.losses(p, batch), 0.0), LossAux(model_state, {})

    train = bilevel.make_step(loss, None, optax.sgd(0.1), None, bilevel.spcl(pace), mode="dense", batch_size=BIG)
    before = train.init(jax.random.key(0), toy.params(1))
    state, metrics = jax.jit(train.step)(before, *batches(0))
    np.testing.assert_array_equal(metrics["weights"], 0)
    assert_equal(state.params, before.params)
    assert metrics["effective_sample_size"] == NOT_COMPUTED


def test_spcl_weights_lie_between_zero_and_one() -> None:
    def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        return jnp.linspace(-1.0, 2.0, BIG) + 0.0 * toy.losses(p, batch), LossAux(model_state, {})

    train = bilevel.make_step(loss, None, optax.sgd(0.1), None, bilevel.spcl(1.5), mode="dense", batch_size=BIG)
    _, metrics = jax.jit(train.step)(train.init(jax.random.key(0), toy.params(1)), *batches(0))
    wanted = np.clip(1 - np.linspace(-1, 2, BIG) / 1.5, 0, 1) / BIG
    np.testing.assert_allclose(metrics["weights"], wanted, rtol=1e-5, atol=1e-8)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))[:, 0]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("of_the_adapter", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_the_model_state_keeps_its_tree(ema_decay: float | None, of_the_adapter: bool, inside: bool) -> None:
    """A FrozenDict, as a whole or inside of a dict, from `linen_loss` or from a loss of one's own that returns dicts."""
    big, specific = batches(0)
    found = linen_loss(Normed(), lambda outputs, batch: (outputs - batch["y"]) ** 2, inputs="x")

    def own(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        losses, aux = found(p, model_state, batch, rng)
        return losses, LossAux(core.unfreeze(aux.model_state), {})

    train = bilevel.make_step(
        found if of_the_adapter else own, toy.weighting, optax.adam(0.01), optax.sgd(0.1), bilevel.dds(), batch_size=4,
        ema_decay=ema_decay, update_every=2,
    )  # fmt: skip
    variables = Normed().init(jax.random.key(0), big["x"])
    stats = core.unfreeze({"batch_stats": variables["batch_stats"]})
    frozen = {"batch_stats": core.freeze(stats["batch_stats"])} if inside else core.freeze(stats)
    state = train.init(jax.random.key(0), variables["params"], toy.weight_params(2), frozen)
    states = jax.lax.scan(lambda s, _: (train.step(s, big, specific)[0], None), state, length=3)[0]
    assert jax.tree.structure(states) == jax.tree.structure(state)
    assert toy.relative_error(states.model_state, state.model_state) > 0
