"""Learning to reweight: the weights against the meta-gradient, written out through the optimizer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_hypergradients import EXACT, ROUGH, theta_gradient

import bilevel
from bilevel.types import Array, UserError

ROWS = 24


def build(optimizer: Any, **options: Any) -> bilevel.TrainStep:
    loss = options.pop("loss", toy.loss)
    return bilevel.make_step(
        loss, None, optimizer, None, bilevel.learning_to_reweight(), mode="dense", batch_size=ROWS, **options
    )


def written_out(optimizer: Any, state: Any, rows: Any, specific: Any) -> Array:
    """w̃ of a state: one step down the meta-gradient from uniform weights, clipped and normalised."""

    def outer(weights: Array) -> Array:
        updates, _ = optimizer.update(theta_gradient(state.params, weights, rows), state.opt_state, state.params)
        return toy.losses(optax.apply_updates(state.params, updates), specific).mean()

    useful = jnp.maximum(-jax.grad(outer)(jnp.full(ROWS, 1 / ROWS)), 0)
    return useful / useful.sum()


@pytest.mark.parametrize(("name", "micro_batches"), [*((name, 1) for name in toy.OPTIMIZERS), ("clipped adam", 4)])
def test_weights_and_update(name: str, micro_batches: int) -> None:
    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        optimizer = toy.OPTIMIZERS[name]()
        train = build(optimizer, derivatives=derivatives, micro_batches=micro_batches)
        p = toy.params(1, dtype)
        state = jax.jit(train.init)(jax.random.key(0), p)
        state = dataclasses.replace(state, opt_state=toy.warm_state(optimizer, p))
        rows, specific = toy.arrays(3, ROWS, dtype), toy.arrays(4, 8, dtype)
        after, metrics = jax.jit(train.step)(state, rows, specific)

        @jax.jit
        def wanted() -> tuple[Array, Any]:
            weights = written_out(optimizer, state, rows, specific)
            return weights, optimizer.update(theta_gradient(p, weights, rows), state.opt_state, p)[0]

        weights, updates = jax.tree.map(np.asarray, wanted())
        assert 0 < np.sum(weights == 0) < ROWS
        assert toy.relative_error(metrics["weights"], weights) <= bound
        change = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after.params, p)
        assert toy.relative_error(change, updates) <= bound
        np.testing.assert_allclose(metrics["effective_sample_size"], 1 / np.sum(weights**2), rtol=bound + 1e-5)
        np.testing.assert_allclose(metrics["largest_weight"], np.max(weights), rtol=bound + 1e-5)
        positive = weights[weights > 0]
        entropy = -np.sum(positive * np.log(positive))
        np.testing.assert_allclose(metrics["weight_entropy"], entropy, rtol=bound + 1e-5)

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    if name == "clipped adam":
        check(np.float32, bilevel.Finite(), ROUGH)


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_probe_in_a_part_of_the_parameters(derivatives: Any) -> None:
    """With SGD: a_i = −η ⟨∇ℓ_i, ∇L_spec(θ⁺)⟩ over the last layer; the update itself moves all of θ."""
    train = build(optax.sgd(0.01), derivatives=derivatives, param_filter=lambda path: path.startswith("last"))
    state = train.init(jax.random.key(0), toy.params(1))
    rows, specific = toy.arrays(3, ROWS), toy.arrays(4, 8)
    after, metrics = jax.jit(train.step)(state, rows, specific)

    @jax.jit
    def wanted() -> Array:
        gradient = theta_gradient(state.params, jnp.full(ROWS, 1 / ROWS), rows)
        moved = jax.tree.map(lambda p, g: p - 0.01 * g, state.params, gradient)
        s = jax.grad(lambda p: toy.losses(p, specific).mean())(moved)["last"]["kernel"]
        a = jax.jacobian(lambda p: toy.losses(p, rows))(state.params)["last"]["kernel"] @ s
        return jnp.maximum(a, 0) / jnp.maximum(a, 0).sum()

    assert toy.relative_error(metrics["weights"], wanted()) < ROUGH
    assert toy.relative_error(after.params["first"]["kernel"], state.params["first"]["kernel"]) > 0


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_uniform_if_no_row_helps(derivatives: Any) -> None:
    """An optimizer that does not move θ: no weight changes the specific loss."""
    train = build(optax.set_to_zero(), derivatives=derivatives)
    state = train.init(jax.random.key(0), toy.params(1))
    _, metrics = jax.jit(train.step)(state, toy.arrays(3, ROWS), toy.arrays(4, ROWS))
    np.testing.assert_allclose(metrics["weights"], np.full(ROWS, 1 / ROWS), rtol=1e-6)
    np.testing.assert_allclose(metrics["effective_sample_size"], ROWS, rtol=1e-5)


def test_every_step_and_one_compilation() -> None:
    traces: list[int] = []

    def loss(*args: Any) -> Any:
        traces.append(1)
        return toy.loss(*args)

    train = build(optax.adam(0.01), loss=loss, ema_decay=0.9)
    assert train.update_every == 1
    state = train.init(jax.random.key(0), toy.params(1))
    shapes = jax.eval_shape(train.init, jax.random.key(0), toy.params(1))
    assert state.weight_params == {}
    step, traced = jax.jit(train.step, donate_argnums=0), []
    for i in range(4):
        state, metrics = step(state, toy.arrays(i, ROWS), toy.arrays(9, 8))
        traced.append(len(traces))
        assert metrics["weights"].shape == metrics["selected"].shape == (ROWS,)
        assert np.isfinite(metrics["specific_loss"])
    assert traced[0] == traced[-1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match='mode="sparse" does not fit'):
        bilevel.make_step(toy.loss, None, optax.sgd(0.1), None, bilevel.learning_to_reweight(), batch_size=ROWS)
    with pytest.raises(UserError, match="update_every=4 does not fit"):
        build(optax.sgd(0.1), update_every=4)
    train = build(optax.sgd(0.1))
    with pytest.raises(UserError, match=f"it has 12 rows and batch_size={ROWS}"):
        train.step(train.init(jax.random.key(0), toy.params(1)), toy.arrays(0, 12), toy.arrays(1, 8))
