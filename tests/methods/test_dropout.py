"""Dropout: both evaluations of a difference have the same masks, and all evaluations of a step those of its key."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel import trees
from bilevel.derivatives.rows import RowLosses
from bilevel.devices import sharding
from bilevel.devices.axis import Axis
from bilevel.nn.transformer import Transformer, TransformerConfig, language_model_loss
from bilevel.step.choosing import keys_of

LENGTH, ROWS, RATE = 10, 8, 0.3
SHAPES = {
    "blocks": TransformerConfig(layers=2, width=16, heads=2, feed_forward=32, dropout=RATE),
    "scanned": TransformerConfig(layers=2, width=16, heads=2, feed_forward=32, dropout=RATE, scan_layers=True),
    "recomputed": TransformerConfig(layers=2, width=16, heads=2, feed_forward=32, dropout=RATE, remat=True),
    "both": TransformerConfig(layers=2, width=16, heads=2, feed_forward=32, dropout=RATE, remat=True, scan_layers=True),
}


def batch(seed: int, rows: int = ROWS) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).integers(1, 256, (rows, LENGTH)).astype(np.uint8)
    return {"tokens": jnp.asarray(tokens), "length": jnp.full(rows, LENGTH, jnp.int32)}


@functools.cache
def parts(name: str) -> tuple[Any, Any]:
    model = Transformer(SHAPES[name])
    return model, jax.jit(lambda: model.init(jax.random.key(0), batch(0)["tokens"])["params"])()


def compiled(model: Transformer, **options: Any) -> Any:
    loss = language_model_loss(model, **options)
    return jax.jit(lambda params, rows, key: loss(params, {}, rows, key)[0])


def weighting(weight_params: Any, rows: Any) -> Any:
    return rows["tokens"].astype(jnp.float32) / 256 @ weight_params


@pytest.mark.parametrize("name", SHAPES)
def test_masks_are_a_function_of_the_key(name: str) -> None:
    model, params = parts(name)
    loss, evaluate = compiled(model), compiled(model, train=False)
    first, again, other = (loss(params, batch(1), jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    still = [evaluate(params, batch(1), jax.random.key(k)) for k in (1, 2)]
    np.testing.assert_array_equal(*still)
    assert np.abs(still[0] - first).max() > 1e-3


def test_recomputed_blocks_have_the_masks_of_the_forward_pass() -> None:
    (plain, params), (recomputed, _) = parts("blocks"), parts("recomputed")

    def gradient(model: Transformer) -> Any:
        loss = language_model_loss(model)
        return jax.jit(jax.grad(lambda p: loss(p, {}, batch(1), jax.random.key(3))[0].mean()))(params)

    assert toy.relative_error(gradient(recomputed), gradient(plain)) < 1e-5


def test_scanned_blocks_have_masks_of_their_own() -> None:
    model, params = parts("scanned")
    seen: list[Any] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = call(*args, **kwargs)
        if type(context.module).__name__ == "Dropout":
            jax.debug.callback(lambda x: seen.append(np.asarray(x) == 0), found, ordered=True)
        return found

    with nn.intercept_methods(record):
        jax.block_until_ready(language_model_loss(model)(params, {}, batch(1), jax.random.key(1)))
    jax.effects_barrier()
    assert len(seen) == 5, "after the embedding, and twice in each of two blocks"
    assert all((one != other).any() for i, one in enumerate(seen) for other in seen[:i])
    assert all(abs(mask.mean() - RATE) < 0.1 for mask in seen)


def test_without_dropout_no_key_is_used() -> None:
    model = Transformer(TransformerConfig(layers=1, width=16, heads=2, feed_forward=32))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(0)["tokens"])["params"])
    text = str(jax.make_jaxpr(language_model_loss(model))(params, {}, batch(1), jax.random.key(1)))
    assert "random" not in text
    _, params = parts("blocks")
    assert "random" in str(
        jax.make_jaxpr(language_model_loss(parts("blocks")[0]))(params, {}, batch(1), jax.random.key(1))
    )


@pytest.mark.parametrize("name", ["blocks", "both"])
@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite(1e-4)], ids=["forward", "finite"])
def test_dds_has_the_gradient_of_its_objective(derivatives: Any, name: str) -> None:
    """The objective written out with the step's keys. Were masks drawn anew at θ + εp, differences would be noise over ε."""
    model, params = parts(name)
    loss, optimizer = language_model_loss(model), optax.sgd(0.1)
    train = bilevel.make_step(
        loss, weighting, optimizer, optax.sgd(1.0), bilevel.dds(), batch_size=ROWS, mode="dense", update_every=1,
        derivatives=derivatives,
    )  # fmt: skip
    alpha, rows, specific = jnp.linspace(-1, 1, LENGTH), batch(1), batch(2, 4)
    state = jax.jit(train.init)(jax.random.key(5), params, alpha)
    after, _ = jax.jit(train.step)(state, rows, specific)
    keys = keys_of(state, Axis(None))

    def written_out(wp: Any) -> Any:
        weights = jax.nn.softmax(weighting(wp, rows))
        gradient = jax.grad(lambda p: (weights * loss(p, {}, rows, keys.loss)[0]).sum())(params)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return loss(moved, {}, specific, keys.specific)[0].mean()

    wanted = jax.jit(jax.grad(written_out))(alpha)
    bound = 1e-3 if isinstance(derivatives, bilevel.Forward) else 3e-2
    assert toy.relative_error(alpha - after.weight_params, wanted) < bound


@pytest.mark.parametrize("parts_of_batch", [1, 2])
def test_hessian_products_by_differences_are_the_exact_ones(parts_of_batch: int) -> None:
    """In micro-batches too, whose keys are split off that of the step."""
    model, params = parts("blocks")
    rows = RowLosses(language_model_loss(model), {}, batch(1), jax.random.key(7), parts_of_batch)
    probe = jax.jit(lambda: jax.grad(lambda p: rows(p)[0].mean())(params))()
    weights, everything = jnp.full(ROWS, 1 / ROWS), trees.make_subset(None, params)

    def second_order(derivatives: Any) -> Any:
        return jax.jit(lambda: derivatives.second_order(rows, params, weights, probe, everything, lambda x: x))()

    exact, finite = second_order(bilevel.Forward()), second_order(bilevel.Finite(1e-4))
    np.testing.assert_allclose(finite.losses, exact.losses, rtol=1e-5)
    assert toy.relative_error(finite.alignments, exact.alignments) < 3e-2
    assert toy.relative_error(finite.hessian_product, exact.hessian_product) < 3e-2


@pytest.mark.parametrize("name", ["blocks", "scanned"])
def test_rows_spread_over_eight_devices_have_the_same_masks(name: str) -> None:
    model, params = parts(name)
    loss, mesh = compiled(model), sharding.make_mesh()
    alone = loss(params, batch(1), jax.random.key(1))
    spread = loss(params, sharding.place_batch(mesh, batch(1)), jax.random.key(1))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
