"""The penalty method's reference model against where it must go, and against SOBA in the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.types import NOT_COMPUTED, Array, LossAux, UserError


def test_reference_goes_to_the_minimum_of_the_penalised_loss() -> None:
    """Quadratic losses, θ at the minimum of L_gen: φ → argmin L_gen + s L_spec, and a_i → ℓ_i(φ) − ℓ_i(θ)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=20)
    xs, ys, strength = rng.normal(size=(9, 4)), np.ones(9), 0.7

    def batch(x: np.ndarray, y: np.ndarray) -> dict[str, Array]:
        return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}

    def loss(p: Array, model_state: dict, batch: dict, key: Array) -> tuple[Array, LossAux]:
        return (batch["x"] @ p - batch["y"]) ** 2, LossAux(model_state, {})

    train = bilevel.make_step(
        loss,
        lambda wp, batch: wp * batch["y"],
        optax.set_to_zero(),
        optax.set_to_zero(),
        bilevel.methods.penalty(optax.sgd(0.1), strength=strength),
        mode="dense",
        batch_size=20,
        update_every=1,
    )
    weights = np.exp(0.7 * y) / np.exp(0.7 * y).sum()
    minimum = np.linalg.solve(x.T @ (weights[:, None] * x), x.T @ (weights * y))
    state = train.init(jax.random.key(0), jnp.asarray(minimum, jnp.float32), jnp.asarray(0.7))
    step = jax.jit(train.step)
    metrics = {}
    for _ in range(300):
        state, metrics = step(state, batch(x, y), batch(xs, ys))
    both = x.T @ (weights[:, None] * x) + strength * xs.T @ xs / 9
    wanted = np.linalg.solve(both, x.T @ (weights * y) + strength * xs.T @ ys / 9)
    np.testing.assert_allclose(minimum + np.asarray(state.method_state.offset), wanted, atol=1e-4)
    gaps = (x @ wanted - y) ** 2 - (x @ minimum - y) ** 2
    np.testing.assert_allclose(metrics["alignment_rms"], np.sqrt(np.mean(gaps**2)), rtol=1e-3)


def test_soba_is_the_limit_of_small_strength() -> None:
    """The α-gradients over three steps of sgd: s times SOBA's, up to terms of second order in s."""
    strength = 1e-5

    def moves(method: bilevel.methods.Method) -> list[np.ndarray]:
        with jax.enable_x64(True):
            train = bilevel.make_step(
                toy.loss,
                toy.weighting,
                optax.sgd(0.05),
                optax.sgd(1.0),
                method,
                derivatives=bilevel.Forward(),
                mode="dense",
                batch_size=toy.ROWS,
                update_every=1,
            )
            p, alpha = toy.params(1, np.float64), toy.weight_params(2, np.float64)
            state, found, step = train.init(jax.random.key(0), p, alpha), [], jax.jit(train.step)
            for i in range(3):
                before = toy.flat(state.weight_params)
                state, _ = step(state, toy.arrays(i, toy.ROWS, np.float64), toy.arrays(9, 3, np.float64))
                found.append(toy.flat(state.weight_params) - before)
                # α stays where it is, so that both see the same weights.
                state = state.__class__(**{**vars(state), "weight_params": alpha})
            return found

    soba = moves(bilevel.soba(optax.sgd(0.1)))
    penalty = moves(bilevel.methods.penalty(optax.sgd(0.1), strength=strength))
    assert np.abs(soba[0]).max() == np.abs(penalty[0]).max() == 0
    for found, wanted in zip(penalty[1:], soba[1:], strict=True):
        assert toy.relative_error(found / strength, wanted) < 1e-3


def test_a_remembered_offset_gives_the_same_alignments() -> None:
    train = bilevel.make_step(
        toy.loss,
        toy.weighting,
        optax.sgd(0.05),
        optax.sgd(1.0),
        bilevel.methods.penalty(optax.sgd(0.1)),
        batch_size=4,
        update_every=1,
        probe_every=2,
    )
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    learn = jax.jit(train.learn)
    for i in range(2):
        state, _ = learn(state, toy.arrays(i, 8), toy.arrays(5, 3))
    learned, _ = learn(state, toy.arrays(3, 8), toy.arrays(5, 3))
    reused, metrics = jax.jit(train.reuse)(state, toy.arrays(3, 8), toy.arrays(5, 3))
    assert toy.relative_error(reused.weight_params, learned.weight_params) < 1e-6
    assert metrics["specific_loss"] == NOT_COMPUTED
    assert toy.relative_error(reused.method_state.offset, state.method_state.offset) == 0


def test_strength_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"penalty\(strength=0\.0\) must be positive"):
        bilevel.methods.penalty(optax.sgd(0.1), strength=0.0)
