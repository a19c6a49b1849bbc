"""Batches that are not batches."""

from typing import Any

import jax.numpy as jnp
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
