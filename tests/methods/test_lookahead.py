"""The derivative of θ's optimizer where θ's gradient is 0 or nearly so, and in types other than θ's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.types import Array, LossAux

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

DEAD = np.linspace(0.5, 1.5, toy.HIDDEN)
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(0.05),
    "clipped adam": lambda: optax.chain(optax.clip_by_global_norm(1e-2), optax.adam(0.05)),
    "wide adam": lambda: optax.adam(0.05, mu_dtype=jnp.float32),
    "scheduled adamw": lambda: optax.adamw(optax.linear_schedule(0.01, 0.1, 3), weight_decay=0.0),
}
METHODS: dict[str, Any] = {
    "dds": bilevel.dds,
    "anograd": lambda: bilevel.anograd(through_optimizer=True),
    "learning to reweight": bilevel.learning_to_reweight,
}


def split_params(dtype: Any, dead: bool) -> Any:
    """The toy's parameters, with or without the weights of the first feature among them."""
    p = toy.params(1, dtype)
    live = {"live": p["first"]["kernel"][1:], "last": p["last"]["kernel"]}
    return live | ({"dead": jnp.asarray(DEAD, dtype)} if dead else {})


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    dead = p.get("dead", jnp.asarray(DEAD, p["live"].dtype))
    whole = {"kernel": jnp.concatenate([dead[None], p["live"]])}
    return toy.loss({"first": whole, "last": {"kernel": p["last"]}}, model_state, {**batch, "x": batch["z"]}, rng)


def batch(seed: int, rows: int, dtype: Any, unseen: bool) -> Any:
    """Rows whose model inputs lack the first feature, if it is unseen."""
    found = toy.arrays(seed, rows, dtype)
    return {**found, "z": found["x"].at[:, 0].set(0.0) if unseen else found["x"]}


def after_two_steps(name: str, optimizer: Any, dtype: Any, derivatives: Any, dead: bool) -> Any:
    reweights = name == "learning to reweight"
    train = bilevel.make_step(
        loss,
        None if reweights else toy.weighting,
        OPTIMIZERS[optimizer](),
        None if reweights else optax.sgd(1.0),
        METHODS[name](),
        mode="dense",
        batch_size=12,
        update_every=1,
        derivatives=derivatives,
        normalize_alignments=True,  # the norm of the specific gradient counts all parameters
    )
    state = train.init(jax.random.key(0), split_params(dtype, dead), toy.weight_params(2, dtype))
    step, metrics = jax.jit(train.step), {}
    for i in range(2):  # Adam's very first move does not depend on the size of the gradient: nothing to compare
        state = dataclasses.replace(state, weight_params=toy.weight_params(2, dtype))
        state, metrics = step(state, batch(i, 12, dtype, True), batch(10 + i, 7, dtype, False))
    return metrics["weights"] if reweights else state.weight_params


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "clipped adam", "scheduled adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_that_no_row_touches_change_nothing(name: str, optimizer: str) -> None:
    """Adam has no derivative where g and its second moment are 0; the specific rows do touch those parameters."""
    with jax.enable_x64(True):
        found, wanted = (
            after_two_steps(name, optimizer, np.float64, bilevel.Forward(), dead) for dead in (True, False)
        )
        assert toy.relative_error(found, wanted) <= 1e-8
    if optimizer == "sgd":
        return
    found = after_two_steps(name, optimizer, np.float32, bilevel.Finite(), True)
    assert np.isfinite(toy.flat(found)).all()


@pytest.mark.parametrize("name", METHODS)
def test_updates_may_be_wider_than_the_parameters(name: str) -> None:
    """bfloat16 parameters under an optimizer whose state and updates are float32."""
    found = after_two_steps(name, "wide adam", jnp.bfloat16, bilevel.Forward(), False)
    assert np.isfinite(toy.flat(found)).all()


@pytest.mark.parametrize("optimizer", ["adam", "clipped adam"])
def test_gradients_whose_squares_are_zero(optimizer: str) -> None:
    """Adam divides by the root of a second moment that is 0 though the gradient is not."""

    def flat_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        flat = batch["size"] * p["flat"] * jnp.abs(batch["x"][:, 0])
        return batch["x"] @ p["w"] + flat, LossAux(model_state, {})

    x = jax.random.normal(jax.random.key(0), (8, 4))
    train = bilevel.make_step(
        flat_loss,
        lambda alpha, b: b["x"] @ alpha,
        OPTIMIZERS[optimizer](),
        optax.sgd(1.0),
        bilevel.dds(),
        batch_size=8,
        mode="dense",
        derivatives=bilevel.Forward(),
    )
    state = train.init(jax.random.key(0), {"w": jnp.ones(4), "flat": jnp.zeros(())}, jnp.zeros(4))
    step = jax.jit(train.step)
    for size in (0.0, 1e-18, -1e-21, 1e-30):
        rows = {"x": x, "size": jnp.full(8, size)}
        after, metrics = step(state, rows, rows)
        assert np.isfinite(metrics["alignment_rms"]), size
        assert np.isfinite(np.asarray(after.weight_params)).all(), size
