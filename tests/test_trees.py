"""Batches that are not batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import trees
from bilevel.types import UserError


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": jnp.zeros((3, 2)), "y": jnp.zeros(4)}, r"\['x'\]: 3, \['y'\]: 4"),
        ({"x": jnp.zeros((3, 2)), "scale": jnp.zeros(())}, r"\['scale'\]: a scalar, \['x'\]: 3"),
        (jnp.zeros(()), "array: a scalar"),
        ({}, "no arrays"),
        ({"x": jnp.zeros((0, 2))}, r"has no rows \(shapes: \(0, 2\)\)"),
    ],
)
def test_arrays_without_a_common_leading_axis(batch: Any, found: str) -> None:
    with pytest.raises(UserError, match=found):
        trees.num_rows(batch)


def test_number_of_rows() -> None:
    assert trees.num_rows({"x": jnp.zeros((3, 2)), "y": jnp.zeros(3)}) == 3


def test_an_average_of_bfloat16_moves() -> None:
    new, found = {"x": jnp.full(3, 3.0, jnp.bfloat16), "n": jnp.int32(7)}, trees.wide({"x": jnp.ones(3, jnp.bfloat16)})
    found = found | {"n": jnp.int32(0)}
    for _ in range(1000):
        found = trees.average(new, found, 0.999)
    assert found["n"] == 7
    np.testing.assert_allclose(found["x"], 3 - 2 * 0.999**1000, rtol=1e-4)


def test_like_leaves_random_keys_alone() -> None:
    """Outside jit too, where they have no `astype`: a model state may hold them."""
    tree = {"rng": jax.random.key(0), "mean": jnp.ones(2)}
    found = trees.like(tree, {"rng": jax.random.key(1), "mean": jnp.zeros(2, jnp.bfloat16)})
    assert found["mean"].dtype == jnp.bfloat16
    assert (jax.random.key_data(found["rng"]) == jax.random.key_data(tree["rng"])).all()
