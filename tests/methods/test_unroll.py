"""An unrolled update of another optimizer than θ's own, against autodiff of the written-out objective."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy

import bilevel

RATE, ROWS = 0.3, 12


def test_dds_unrolls_plain_sgd_while_theta_moves_by_adam() -> None:
    """Grangier et al., equation 3, with the weights of dense mode."""
    with jax.enable_x64(True):
        p, alpha = toy.params(1, np.float64), toy.weight_params(2, np.float64)
        big, specific = toy.arrays(3, ROWS, np.float64), toy.arrays(4, 7, np.float64)
        train = bilevel.make_step(
            toy.loss, toy.weighting, optax.adam(0.05), optax.sgd(1.0), bilevel.dds(unroll=optax.sgd(RATE)),
            batch_size=ROWS, mode="dense", derivatives=bilevel.Forward(),
        )  # fmt: skip
        after, _ = jax.jit(train.learn)(train.init(jax.random.key(0), p, alpha), big, specific)

        def written_out(alpha: Any) -> Any:
            weights = jax.nn.softmax(toy.weighting(alpha, big))
            gradient = jax.grad(lambda q: jnp.sum(weights * toy.losses(q, big)))(p)
            return toy.losses(jax.tree.map(lambda x, g: x - RATE * g, p, gradient), specific).mean()

        found = jax.tree.map(lambda a, b: a - b, alpha, after.weight_params)
        assert toy.relative_error(found, jax.jit(jax.grad(written_out))(alpha)) <= 1e-8


def test_sign_optimizers_teach_what_is_unrolled_by_sgd() -> None:
    """Lion's own derivative is 0 everywhere; that of the unrolled step is not."""
    train = bilevel.make_step(
        toy.loss, toy.weighting, optax.lion(0.01), optax.sgd(1.0), bilevel.dds(unroll=optax.sgd(RATE)), batch_size=4
    )
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))  # warnings are errors here
    after, metrics = jax.jit(train.learn)(state, toy.arrays(3, ROWS), toy.arrays(4, 7))
    assert metrics["alignment_rms"] > 0
    assert toy.relative_error(after.weight_params, state.weight_params) > 0


def test_learning_to_reweight_by_a_plain_step() -> None:
    """Weights are the positive parts of −ρ a, so the rate does not matter beyond where ∇L_spec is taken."""
    big, specific = toy.arrays(3, ROWS), toy.arrays(4, 7)
    train = bilevel.make_step(
        toy.loss, None, optax.adam(0.05), None, bilevel.learning_to_reweight(unroll=optax.sgd(RATE)), batch_size=ROWS,
        mode="dense", derivatives=bilevel.Forward(),
    )  # fmt: skip
    p = toy.params(1)
    _, metrics = jax.jit(train.step)(train.init(jax.random.key(0), p), big, specific)

    @jax.jit
    def wanted() -> Any:
        uniform = jnp.full(ROWS, 1 / ROWS)

        def lowered(weights: Any) -> Any:
            gradient = jax.grad(lambda q: jnp.sum(weights * toy.losses(q, big)))(p)
            return toy.losses(jax.tree.map(lambda x, g: x - RATE * g, p, gradient), specific).mean()

        useful = jnp.maximum(-jax.grad(lowered)(uniform), 0)
        return useful / useful.sum()

    np.testing.assert_allclose(metrics["weights"], wanted(), rtol=1e-4, atol=1e-6)
