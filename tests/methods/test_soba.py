"""SOBA's tracker against the linear system that it follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import trees
from bilevel.derivatives.rows import RowLosses
from bilevel.types import Array, LossAux


@pytest.mark.parametrize(("derivatives", "damping"), [(bilevel.Forward(), 0.0), (bilevel.Finite(), 0.5)])
def test_tracker_converges_to_the_solution(derivatives: bilevel.Forward | bilevel.Finite, damping: float) -> None:
    """Quadratic losses, θ and α held still: v → −(H + λI)⁻¹ ∇L_spec."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=20)
    generic = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    specific = {"x": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), "y": jnp.ones(9)}

    def loss(p: Array, model_state: dict, batch: dict, key: Array) -> tuple[Array, LossAux]:
        return (batch["x"] @ p - batch["y"]) ** 2, LossAux(model_state, {})

    train = bilevel.make_step(
        loss,
        lambda wp, batch: wp * batch["y"],
        optax.set_to_zero(),
        optax.set_to_zero(),
        bilevel.soba(optax.sgd(0.1), damping=damping),
        derivatives=derivatives,
        mode="dense",
        batch_size=20,
        update_every=1,
    )
    p, alpha = jnp.asarray(rng.normal(size=4), jnp.float32), jnp.asarray(0.7)
    state = train.init(jax.random.key(0), p, alpha)
    step = jax.jit(train.step)
    for _ in range(400):
        state, _ = step(state, generic, specific)
    weights = np.asarray(jax.nn.softmax(alpha * generic["y"]), np.float64)
    hessian = 2 * x.T @ (weights[:, None] * x) + damping * np.eye(4)
    gradient = 2 * np.asarray(specific["x"]).T @ np.asarray(specific["x"] @ p - 1) / 9
    np.testing.assert_allclose(state.method_state.v, -np.linalg.solve(hessian, gradient), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_hessian_product(derivatives: bilevel.Forward | bilevel.Finite) -> None:
    p, probe, batch = toy.params(0), toy.params(1), toy.arrays(2, 10)
    weights = jax.nn.softmax(jnp.arange(10.0) / 5)
    subset = trees.make_subset(None, p)
    losses = RowLosses(toy.loss, {}, batch, jax.random.key(0))
    flat, unravel = ravel_pytree(p)
    direction = ravel_pytree(probe)[0]

    @jax.jit
    def found() -> tuple[Array, Array]:
        found = derivatives.second_order(losses, p, weights, probe, subset, lambda tree: tree)
        return ravel_pytree(found.hessian_product)[0], found.alignments

    @jax.jit
    def wanted() -> tuple[Array, Array]:
        hessian = jax.hessian(lambda x: jnp.sum(weights * toy.losses(unravel(x), batch)))(flat)
        return hessian @ direction, jax.jacobian(lambda x: toy.losses(unravel(x), batch))(flat) @ direction

    bound = 1e-5 if isinstance(derivatives, bilevel.Forward) else 2e-2
    for one, other in zip(found(), wanted(), strict=True):
        assert toy.relative_error(one, other) < bound


def test_bound_and_type_of_the_tracker() -> None:
    method = bilevel.soba(optax.sgd(100.0), max_norm=0.5, dtype=jnp.bfloat16)
    train = bilevel.make_step(
        toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(0.1), method, batch_size=4, update_every=1
    )
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    state, _ = jax.jit(train.step)(state, toy.arrays(0, 8), toy.arrays(1, 3))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.method_state.v))
    assert float(trees.norm(state.method_state.v)) == pytest.approx(0.5, rel=0.02)
