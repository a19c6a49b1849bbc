"""Behaviour: of three synthetic sources the good one gets most weight, and pure noise almost none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.types import Array, LossAux

FEATURES, BIG, SMALL = 6, 96, 24
TRUE = np.linspace(-1, 1, FEATURES)
GOOD, HALF, NOISE = 0, 1, 2


def rows(rng: np.random.Generator, count: int, sources: np.ndarray) -> dict[str, Array]:
    """Linear regression: right labels, labels that are right half of the time, and labels without any relation."""
    x = rng.normal(size=(count, FEATURES))
    right = x @ TRUE
    wrong = 3 * rng.normal(size=count)
    spoilt = (sources == NOISE) | ((sources == HALF) & (rng.random(count) < 0.5))
    return {
        "x": jnp.asarray(x, jnp.float32),
        "y": jnp.asarray(np.where(spoilt, wrong, right), jnp.float32),
        "source": jnp.asarray(sources, jnp.int32),
    }


def loss(p: Array, model_state: Any, batch: Any, rng: Array) -> tuple[Array, LossAux]:
    return (batch["x"] @ p - batch["y"]) ** 2, LossAux(model_state, {})


def weighting(wp: Array, batch: Any) -> Array:
    return wp[batch["source"]]


METHODS = {
    "dds": bilevel.dds,
    "anograd": lambda: bilevel.anograd(average_specific=0.9),
    "soba": lambda: bilevel.soba(optax.sgd(0.05), damping=0.1),
}


@pytest.mark.parametrize("mode", ["dense", "sparse", "sparse score"])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_the_sources(method: str, mode: str) -> None:
    dense, score = mode == "dense", mode.endswith("score")
    train = bilevel.make_step(
        loss,
        weighting,
        optax.sgd(0.02),
        optax.adam(0.03),
        METHODS[method](),
        mode="dense" if dense else "sparse",
        estimator="score" if score else "softmax",
        batch_size=BIG if dense else SMALL,
        update_every=1,
        normalize_alignments=score,
    )
    state = train.init(jax.random.key(0), jnp.zeros(FEATURES), jnp.zeros(3))
    step = jax.jit(train.step, donate_argnums=0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        big = rows(rng, BIG, rng.integers(0, 3, BIG))
        state, _ = step(state, big, rows(rng, SMALL, np.full(SMALL, GOOD)))
    shares = np.asarray(jax.nn.softmax(state.weight_params))
    assert shares[GOOD] > shares[HALF] > shares[NOISE], shares
    assert shares[GOOD] > 0.5, shares
    assert shares[NOISE] < 0.05, shares
