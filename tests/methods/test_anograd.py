"""Anograd where a gradient is 0."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.methods.anograd import cosine_probe


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


@pytest.mark.parametrize(("generic", "specific"), [(0.1, 0.0), (0.0, 0.1), (1e-15, 1e-18), (1e-25, 1e-3), (0.0, 0.0)])
def test_no_gradient_is_too_small(generic: float, specific: float) -> None:
    """0 where either is too small to be squared, and otherwise as if both were of a common size."""
    pattern = np.array([1.0, 1.0, -2.0], np.float32), np.array([1.0, 0.0, 1.0], np.float32)
    probe = cosine_probe(*({"w": jnp.asarray(s * x)} for s, x in zip((generic, specific), pattern, strict=True)))["w"]
    if min(generic, specific) < 1e-19:
        np.testing.assert_array_equal(probe, 0)
    else:
        usual = cosine_probe(*({"w": jnp.asarray(x)} for x in pattern))["w"]
        np.testing.assert_allclose(generic * probe, usual, rtol=1e-5)


def test_moves_far_below_the_rounding_of_the_parameters() -> None:
    """The cosine is that of the optimizer's move itself, not of what float32 parameters show of it."""

    def gradient(dtype: Any) -> np.ndarray:
        train = bilevel.make_step(
            toy.loss,
            toy.weighting,
            optax.adam(1e-8),
            optax.sgd(1.0),
            bilevel.anograd(through_optimizer=True),
            batch_size=12,
            update_every=1,
            derivatives=bilevel.Forward(),
            normalize_alignments=True,
        )
        start = toy.weight_params(2, dtype)
        state = train.init(jax.random.key(0), toy.params(1, dtype), start)
        step = jax.jit(train.step)
        for i in range(3):  # Adam's very first move does not depend on the size of the gradient
            state = dataclasses.replace(state, weight_params=start)
            state, _ = step(state, toy.arrays(i, 12, dtype), toy.arrays(10 + i, 7, dtype))
        return toy.flat(start) - toy.flat(state.weight_params)

    with jax.enable_x64(True):
        wanted = gradient(np.float64)
    assert toy.relative_error(gradient(np.float32), wanted) < 1e-3
