"""Model state is in the loss contract: BatchNorm statistics move once a step, in linen and in NNX alike."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx

import bilevel
from bilevel.nn.adapters import linen_loss, nnx_loss
from bilevel.types import Array

HIDDEN, BATCH = 4, 8


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(HIDDEN)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))[:, 0]


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(toy.FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(nnx.relu(self.norm(self.first(x))))[:, 0]


def squared(outputs: Array, batch: Any) -> Array:
    return (outputs - batch["y"]) ** 2


@functools.cache
def linen_parts() -> tuple[Any, Any, Any]:
    net = LinenNet()
    variables = jax.jit(lambda: net.init(jax.random.key(0), jnp.zeros((1, toy.FEATURES)), train=True))()
    state = {"batch_stats": variables["batch_stats"]}
    return linen_loss(net, squared, inputs="x", train=True), variables["params"], state


def nnx_parts() -> tuple[Any, Any, Any]:
    """The NNX twin of the linen net: the same numbers."""
    net = NNXNet(nnx.Rngs(0))
    _, params, _ = linen_parts()
    for layer, name in ((net.first, "Dense_0"), (net.last, "Dense_1")):
        layer.kernel[...] = params[name]["kernel"]
        assert layer.bias is not None
        layer.bias[...] = params[name]["bias"]
    graphdef, state, rest = nnx.split(net, nnx.Param, ...)
    return nnx_loss(graphdef, squared, inputs="x"), state, rest


METHODS = {
    "uniform": bilevel.uniform,
    "dds": bilevel.dds,
    "anograd": bilevel.anograd,
    "soba": lambda: bilevel.soba(optax.sgd(0.1)),
}


def after_steps(parts: tuple[Any, Any, Any], method: str, derivatives: Any, **options: Any) -> bilevel.TrainState:
    loss, params, model_state = parts
    train = bilevel.make_step(
        loss,
        toy.weighting,
        optax.sgd(0.05),
        optax.sgd(0.5),
        METHODS[method](),
        batch_size=BATCH,
        derivatives=derivatives,
        update_every=1,
        **options,
    )
    state = train.init(jax.random.key(1), params, toy.weight_params(2), model_state)
    step = jax.jit(train.step)
    for i in range(3):
        state, _ = step(state, toy.arrays(i, 16), toy.arrays(50 + i, 8))
    return state


@pytest.mark.parametrize(("method", "derivatives"), [("dds", bilevel.Finite()), ("soba", bilevel.Forward())])
def test_linen_and_nnx_give_the_same_run(method: str, derivatives: Any) -> None:
    linen = after_steps(linen_parts(), method, derivatives)
    other = after_steps(nnx_parts(), method, derivatives)
    kernel = np.asarray(linen.params["Dense_0"]["kernel"])
    np.testing.assert_allclose(other.params["first"]["kernel"][...], kernel, rtol=1e-3, atol=1e-5)
    mean = np.asarray(linen.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    np.testing.assert_allclose(other.model_state["norm"]["mean"][...], mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(other.weight_params["w"], linen.weight_params["w"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "derivatives"),
    [
        ("dds", {}, bilevel.Finite()),
        ("dds", {"alpha_batch": "uniform"}, bilevel.Forward()),
        ("anograd", {}, bilevel.Finite()),
        ("soba", {}, bilevel.Forward()),
        ("soba", {"alpha_batch": "uniform"}, bilevel.Finite()),
    ],
)
def test_statistics_move_once_a_step(method: str, options: dict[str, Any], derivatives: Any) -> None:
    """One step from the start: the statistics are those of the θ-update's rows, with weight 1 − momentum."""
    loss, params, model_state = linen_parts()
    train = bilevel.make_step(
        loss,
        toy.weighting,
        optax.sgd(0.05),
        optax.sgd(0.5),
        METHODS[method](),
        batch_size=BATCH,
        derivatives=derivatives,
        update_every=1,
        **options,
    )
    state = jax.jit(train.init)(jax.random.key(1), params, toy.weight_params(2), model_state)
    big = toy.arrays(0, 16)
    after, metrics = jax.jit(train.step)(state, big, toy.arrays(50, 8))
    layer = jax.tree.map(np.asarray, params["Dense_0"])
    hidden = np.asarray(big["x"])[np.asarray(metrics["selected"])] @ layer["kernel"] + layer["bias"]
    wanted = 0.1 * hidden.mean(0)
    np.testing.assert_allclose(after.model_state["batch_stats"]["BatchNorm_0"]["mean"], wanted, rtol=1e-4, atol=1e-6)


def test_nnx_dropout_draws_from_the_key_of_the_step() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.drop, self.again = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(64))

        def __call__(self, x: Array) -> Array:
            first = self.drop(x * self.scale[...])
            return first + 10 * self.again(jnp.ones_like(x))

    graphdef, params, model_state = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    loss = nnx_loss(graphdef, lambda outputs, batch: outputs.sum(1), inputs="x")
    rows = {"x": jnp.ones((4, 64))}
    compiled = jax.jit(loss)
    found = [compiled(params, model_state, rows, jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert (found[0][0] != found[2][0]).any()
    for _, aux in found:  # the streams stay, or devices would not have one model state
        jax.tree.map(np.testing.assert_array_equal, key_data(aux.model_state), key_data(model_state))
    masks = nnx_loss(graphdef, lambda outputs, batch: outputs, inputs="x")(
        params, model_state, rows, jax.random.key(0)
    )[0]
    assert {0.0, 2.0, 20.0, 22.0} == set(np.unique(masks).tolist()), "each layer draws for itself"


def key_data(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
