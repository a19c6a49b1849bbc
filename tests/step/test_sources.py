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
    "penalty": lambda: bilevel.penalty(optax.adam(0.01)),
    "implicit cg": lambda: bilevel.implicit_cg(average_specific=0.9),
    "implicit neumann": lambda: bilevel.implicit_neumann(step_size=0.05, damping=0.1, average_specific=0.9),
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


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_meta_weight_net_learns_that_large_losses_are_noise(mode: str) -> None:
    dense = mode == "dense"
    net = bilevel.meta_weight_net(loss, hidden=16)
    train = bilevel.make_step(
        loss, net.scorer, optax.sgd(0.02), optax.adam(0.01), bilevel.dds(), mode="dense" if dense else "sparse",
        batch_size=BIG if dense else SMALL, update_every=1,
    )  # fmt: skip
    state = train.init(jax.random.key(0), jnp.zeros(FEATURES), net.init(jax.random.key(1)))
    step = jax.jit(train.step, donate_argnums=0)
    rng = np.random.default_rng(0)
    big: Any = {}
    for _ in range(400):
        big = rows(rng, BIG, rng.integers(0, 3, BIG))
        state, _ = step(state, big, rows(rng, SMALL, np.full(SMALL, GOOD)))
    big = rows(rng, 3000, np.arange(3000) % 3)
    seen = net.scorer.features(state.params, {}, big, jax.random.key(0))
    weights = jax.nn.softmax(net.scorer.logits(state.weight_params, big, seen))
    shares = np.asarray(bilevel.metrics.domain_shares(big["source"], 3, weights))
    assert shares[GOOD] > shares[HALF] > shares[NOISE], shares
    assert shares[GOOD] > 0.45, shares


def logistic(p: Array, model_state: Any, batch: Any, rng: Array) -> tuple[Array, LossAux]:
    """Of the sign of y: gradients of bounded size, so that weights show the direction."""
    return jax.nn.softplus(-jnp.sign(batch["y"]) * (batch["x"] @ p)), LossAux(model_state, {})


def test_learning_to_reweight_prefers_the_good_source() -> None:
    """By the mean weights of the batches, and θ ends nearer to the direction of the truth than with uniform weights."""
    cosines, shares = {}, np.zeros(3)
    for name in ("uniform", "learning to reweight"):
        method = bilevel.uniform() if name == "uniform" else bilevel.learning_to_reweight()
        train = bilevel.make_step(logistic, None, optax.sgd(0.1), None, method, mode="dense", batch_size=BIG)
        state, step = train.init(jax.random.key(0), jnp.zeros(FEATURES)), jax.jit(train.step, donate_argnums=0)
        rng = np.random.default_rng(0)
        for _ in range(200):
            big = rows(rng, BIG, np.append(np.full(8, GOOD), np.arange(BIG - 8) % 2 + 1))
            state, metrics = step(state, big, rows(rng, SMALL, np.full(SMALL, GOOD)))
            if "weights" in metrics:
                mass = np.bincount(np.asarray(big["source"]), np.asarray(metrics["weights"]), minlength=3)
                shares += mass / np.bincount(np.asarray(big["source"]), minlength=3) / 200
        theta = np.asarray(state.params)
        cosines[name] = theta @ TRUE / np.linalg.norm(theta) / np.linalg.norm(TRUE)
    assert shares[GOOD] > shares[HALF] > shares[NOISE], shares
    assert cosines["learning to reweight"] > cosines["uniform"], cosines
