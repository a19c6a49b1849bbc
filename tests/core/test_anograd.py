"""Anograd where a gradient is 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_no_direction_without_a_generic_gradient(derivatives: Any) -> None:
    """Below a last layer that starts at 0 all gradients are 0: the rows say nothing, and α stays."""
    train = bilevel.make_step(
        toy.loss,
        toy.weighting,
        optax.sgd(0.1),
        optax.sgd(0.1),
        bilevel.anograd(),
        batch_size=4,
        derivatives=derivatives,
        param_filter=lambda path: path.startswith("first"),
    )
    p = toy.params(1) | {"last": {"kernel": jnp.zeros(toy.HIDDEN)}}
    state = train.init(jax.random.key(0), p, toy.weight_params(2))
    state, metrics = jax.jit(train.step)(state, toy.arrays(0, 12), toy.arrays(1, 4))
    assert float(metrics["alignment_rms"]) == 0
    np.testing.assert_array_equal(toy.flat(state.weight_params), toy.flat(toy.weight_params(2)))
