"""The pullback of optimizers where reverse mode has none, against that of the parameters that do have one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.derivatives.singularities import without_singularities
from bilevel.types import Array

SEEN, MASKED = jnp.asarray([0.3, -0.2, 0.7]), jnp.asarray([0.5, 0.1])


def keep_seen() -> optax.GradientTransformation:
    """A pruning mask: the gradient of the second leaf is 0 from here on."""

    def mask(gradient: Any, _: Any) -> Any:
        return {name: x * (name == "seen") for name, x in gradient.items()}

    return optax.stateless(mask)


def halves(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.MultiSteps(optimizer, 1).gradient_transformation()


def pulled(optimizer: optax.GradientTransformation, params: dict[str, Array], guarded: bool, done: int = 1) -> Any:
    """(∂U/∂g)ᵀ of a fixed cotangent after that many updates."""
    state = optimizer.init(params)
    for _ in range(done):
        _, state = optimizer.update(params, state, params)

    def update(gradient: Any) -> Any:
        return optimizer.update(gradient, state, params)[0]

    gradient = jax.tree.map(jnp.cos, params)
    _, pullback = jax.vjp(without_singularities(update) if guarded else update, gradient)
    return pullback(jax.tree.map(jnp.sin, params))[0]


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: optax.adam(0.1),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
    "in a cond": lambda: halves(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_before_the_root_changes_nothing_for_the_others(name: str) -> None:
    optimizer = optax.chain(keep_seen(), OPTIMIZERS[name]())
    plain = pulled(optimizer, {"seen": SEEN, "masked": MASKED}, False)
    assert not np.isfinite(plain["masked"]).all(), "nothing to guard"
    found = pulled(optimizer, {"seen": SEEN, "masked": MASKED}, True)
    wanted = pulled(optimizer, {"seen": SEEN}, False)
    np.testing.assert_array_equal(found["masked"], 0)
    np.testing.assert_allclose(found["seen"], wanted["seen"], rtol=1e-5)
    assert np.all(wanted["seen"] != 0)


def test_a_branch_that_is_not_taken() -> None:
    """RAdam has the root of a negative number in it: on the first steps its update is a momentum's, of derivative −lr."""
    optimizer, params = optax.radam(0.1), {"seen": SEEN}
    assert np.isnan(pulled(optimizer, params, False, done=2)["seen"]).all()
    found = pulled(optimizer, params, True, done=2)["seen"]
    np.testing.assert_allclose(found, -0.1 * 0.1 / (1 - 0.9**3) * jnp.sin(SEEN), rtol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.adafactor(0.1)])
def test_nothing_changes_without_singularities(optimizer: Any) -> None:
    found, wanted = (pulled(optimizer, {"seen": SEEN}, guarded)["seen"] for guarded in (True, False))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.any(wanted != 0)
