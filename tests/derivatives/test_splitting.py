"""The cut of a function below what does not depend on its first argument."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import trees
from bilevel.derivatives.rows import RowLosses
from bilevel.derivatives.splitting import split
from bilevel.nn.transformer import Transformer, TransformerConfig, language_model_loss

CONFIG = TransformerConfig(layers=3, width=16, heads=2, feed_forward=32, dropout=0.1)
BATCH = {"tokens": np.arange(40, dtype=np.uint8).reshape(4, 10), "length": np.array([10, 7, 1, 10], np.int32)}
WEIGHTS = jnp.array([0.1, 0.2, 0.3, 0.4])


@functools.cache
def parameters() -> Any:
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(0), BATCH["tokens"])["params"])()


def rows(loss: Any = None) -> tuple[RowLosses, Any]:
    """The losses of a transformer with dropout, so that both halves draw, and its parameters."""
    batch = jax.tree.map(jnp.asarray, BATCH)
    return RowLosses(loss or language_model_loss(Transformer(CONFIG)), {}, batch, jax.random.key(1)), parameters()


def last(path: str) -> bool:
    return path.startswith(("block_2/", "final_norm/"))


def products(function: Any, *arguments: Any) -> int:
    """How many matrix products the function traces."""
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


def test_both_halves_give_the_function() -> None:
    def function(x: Any, y: Any) -> Any:
        low = jnp.tanh(y["a"] @ y["b"])
        return {"high": jax.nn.softmax(x * low), "low": low, "constant": 3, "count": y["n"] + 1}

    y = {"a": jnp.ones((2, 3)), "b": jnp.arange(12.0).reshape(3, 4), "n": jnp.int32(5)}
    halves = split(function, jnp.float32(1), y)
    known = halves.below(y)
    assert [(v.shape, v.dtype) for v in known] == [((2, 4), jnp.float32), ((), jnp.int32)]
    for x in (1.0, -2.0):
        assert_close(halves.above(jnp.float32(x), known), function(jnp.float32(x), y))
    moved = {**y, "b": 2 * y["b"]}
    assert_close(halves.above(jnp.float32(1), halves.below(moved)), function(jnp.float32(1), moved))


@pytest.mark.parametrize("wrap", [lambda f: f, pytest.param(jax.jit, marks=pytest.mark.slow)], ids=["plain", "jit"])
def test_losses_and_gradients_are_those_without_a_cut(wrap: Any) -> None:
    """Also through a loss that is one `jit`, which cannot be cut."""
    uncut, params = rows()
    losses, _ = rows(wrap(uncut.loss))
    subset = trees.make_subset(last, params)
    moved = jax.tree.map(lambda x: 1.1 * x + 0.01, subset.restrict(params))

    @jax.jit
    def expected(params: Any) -> Any:
        whole = uncut.differentiated(params, WEIGHTS)
        return whole[:3], whole.reweighted(1 - WEIGHTS), (whole.losses, subset.restrict(whole.gradient))

    @jax.jit
    def found() -> Any:
        cut = losses.differentiated(params, WEIGHTS, subset)
        return cut[:3], cut.reweighted(1 - WEIGHTS), cut.losses_at(moved)[0], cut.gradient_at(moved, WEIGHTS)

    here, reweighted, losses_there, gradient_there = found()
    assert_close((here, reweighted), expected(params)[:2])
    there = expected(subset.merge(moved, params))[2]
    assert_close((losses_there, gradient_there), (there[0], there))


def test_nothing_below_the_chosen_block_is_evaluated_again() -> None:
    losses, params = rows()
    subset = trees.make_subset(last, params)
    part = subset.restrict(params)
    whole = products(lambda p: losses(p)[0], params)
    halves = split(lambda part, params: losses(subset.merge(part, params))[0], part, params)
    known = jax.eval_shape(halves.below, params)
    # The embedding's product and six in a block; six in the last block and that of the logits.
    assert (whole, products(halves.below, params), products(halves.above, part, known)) == (20, 13, 7)

    def both(params: Any) -> Any:
        found = losses.differentiated(params, WEIGHTS, subset)
        return found.gradient, found.losses_at(jax.tree.map(jnp.cos, subset.restrict(params)))[0]

    plain = products(lambda p: losses.pulled_back(p, WEIGHTS)[2], params)
    assert products(both, params) == plain + 7


def test_what_depends_on_neither_argument_is_made_again() -> None:
    """Nothing crosses the cut but activations and the embedding: masks and draws of dropout are cheaper made again than kept."""
    losses, params = rows()
    subset = trees.make_subset(last, params)
    part = subset.restrict(params)
    halves = split(lambda part, params: losses(subset.merge(part, params))[0], part, params)
    known = jax.eval_shape(halves.below, params)
    assert {(v.shape, v.dtype) for v in known} == {
        (shape, jnp.dtype(jnp.float32)) for shape in [(4, 10, 16), (4, 10, 1), (256, 16)]
    }


@pytest.mark.parametrize("chosen", [last, pytest.param(lambda path: True, marks=pytest.mark.slow)], ids=["last", "all"])
def test_only_parameters_are_differentiated(chosen: Any) -> None:
    """What has no reverse-mode derivative may see arrays of the batch, and activations behind `stop_gradient`."""
    uncut, params = rows()

    def loss(params: Any, state: Any, batch: Any, rng: Any) -> Any:
        losses, aux = uncut.loss(params, state, batch, rng)
        start = (jax.lax.stop_gradient(losses), batch["length"].astype(jnp.float32))
        halved, _ = jax.lax.while_loop(lambda x: jnp.max(x[0]) > 1, lambda x: (x[0] / 2, x[1] + 1), start)
        return losses * halved, aux

    losses, _ = rows(loss)
    subset = trees.make_subset(chosen, params)
    moved = jax.tree.map(lambda x: 1.1 * x, subset.restrict(params))

    @jax.jit
    def both() -> Any:
        found, expected = losses.differentiated(params, WEIGHTS, subset), losses.differentiated(params, WEIGHTS)
        at_moved = losses(subset.merge(moved, params))[0]
        return (found[:3], found.losses_at(moved)[0]), (expected[:3], at_moved)

    assert_close(*both())


@pytest.mark.slow
def test_parts_are_evaluated_one_after_the_other() -> None:
    """Micro-batches keep no activations to start from, and give the same."""
    whole, params = rows(
        language_model_loss(Transformer(TransformerConfig(layers=3, width=16, heads=2, feed_forward=32)))
    )
    parts = RowLosses(whole.loss, {}, whole.batch, whole.rng, 2)
    subset = trees.make_subset(last, params)
    moved = jax.tree.map(lambda x: 1.1 * x + 0.01, subset.restrict(params))

    def all_of(losses: RowLosses) -> Any:
        found = losses.differentiated(params, WEIGHTS, subset)
        return found[:3], found.losses_at(moved)[0], found.gradient_at(moved, WEIGHTS)

    assert_close(*jax.jit(lambda: (all_of(whole), all_of(parts)))())


def test_batch_statistics_cross_the_cut() -> None:
    """What the lower half returns beside activations, such as new statistics, comes out as it is."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(3, name="first")(x))
            return nn.Dense(1, name="last")(nn.relu(x))[:, 0]

    net, x = Net(), jnp.linspace(-1, 1, 10).reshape(5, 2)
    variables = jax.jit(net.init)(jax.random.key(0), x)

    def function(part: Any, params: Any) -> Any:
        state = {"params": {**params, **part}, "batch_stats": variables["batch_stats"]}
        return net.apply(state, x, mutable=["batch_stats"])

    part = {"last": variables["params"]["last"]}
    halves = split(function, part, variables["params"])
    moved = jax.tree.map(lambda x: x + 1, part)

    @jax.jit
    def both() -> Any:
        known = halves.below(variables["params"])
        return halves.above(moved, known), function(moved, variables["params"])

    assert_close(*both())


def test_forward_mode_and_second_derivatives() -> None:
    def function(x: Any, y: Any) -> Any:
        return jnp.sum(jnp.sin(x * jnp.exp(y)) ** 2)

    x, y = jnp.array([0.3, 0.7]), jnp.array([0.1, -0.2])
    halves = split(function, x, y)

    def again(x: Any, y: Any) -> Any:
        return halves.above(x, halves.below(y))

    hessians = jax.jit(lambda x, y: [jax.hessian(f, (0, 1))(x, y) for f in (again, function)])
    assert_close(*hessians(x, y))
    stacked = jnp.stack([x, 2 * x]), jnp.stack([y, -y])
    assert_close(jax.jit(jax.vmap(again))(*stacked), jax.jit(jax.vmap(function))(*stacked))
