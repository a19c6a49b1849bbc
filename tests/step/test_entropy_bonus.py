"""The entropy bonus and the pull on the common shift: the gradients they add, and what they keep logits from."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.selection import filters
from bilevel.selection.scorers import bounded
from bilevel.step.estimators import Estimator, logit_cotangents, shift_pull
from bilevel.types import Array, UserError

LOGITS = jnp.asarray([0.5, -1.0, 1.5, 0.0, 0.2])
ALIGNMENTS = jnp.asarray([0.3, -1.0, 2.0, 0.7, 0.1])
BONUS = 0.3


def lowered(logits: Array) -> Array:
    """Σ w a − λ H(w)."""
    weights = jax.nn.softmax(logits)
    return jnp.sum(weights * (ALIGNMENTS + BONUS * jnp.log(weights)))


def test_softmax_estimator_adds_the_gradient_of_the_entropy() -> None:
    found = logit_cotangents(ALIGNMENTS, LOGITS, "softmax", num_rows=5, pull=BONUS * (LOGITS - 7.0))
    np.testing.assert_allclose(found, jax.grad(lowered)(LOGITS), atol=1e-6)


def test_score_estimator_adds_it_in_the_mean() -> None:
    weights, mean = np.asarray(jax.nn.softmax(LOGITS)), np.zeros(5)
    for rows in itertools.product(range(5), repeat=3):
        i = jnp.asarray(rows)
        c = logit_cotangents(ALIGNMENTS[i], LOGITS[i], "score", num_rows=3, pull=BONUS * LOGITS[i])
        mean += np.prod(weights[list(rows)]) * np.bincount(rows, np.asarray(c), minlength=5)
    np.testing.assert_allclose(mean, jax.grad(lowered)(LOGITS), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["entropy_bonus", "shift_pull"])
def test_a_step_moves_alpha_by_it(name: str, temperature: float) -> None:
    """Dense, where all rows have a part: −λτ times the gradient of the entropy, or −κ/τ times that of (Σ w s)²/2, w held."""
    alpha, big, specific = toy.weight_params(2), toy.arrays(3, 12), toy.arrays(4, 3)

    def moved(strength: float) -> Array:
        given: Any = {name: strength}
        train = bilevel.make_step(
            toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(1.0), bilevel.dds(), batch_size=12, mode="dense",
            filter=filters.gumbel_top_k(temperature=temperature), **given,
        )  # fmt: skip
        state = train.init(jax.random.key(0), toy.params(1), alpha)
        return jnp.asarray(toy.flat(jax.jit(train.learn)(state, big, specific)[0].weight_params))

    def negative_entropy(alpha: dict[str, Array]) -> Array:
        log_weights = jax.nn.log_softmax(toy.weighting(alpha, big) / temperature)
        return temperature * jnp.sum(jnp.exp(log_weights) * log_weights)

    def half_square_of_the_mean(alpha: dict[str, Array]) -> Array:
        logits = toy.weighting(alpha, big)
        weights = jax.lax.stop_gradient(jax.nn.softmax(logits / temperature))
        return jnp.sum(weights * logits) ** 2 / 2 / temperature

    lowers = {"entropy_bonus": negative_entropy, "shift_pull": half_square_of_the_mean}[name]
    wanted = -BONUS * toy.flat(jax.grad(lowers)(alpha))
    np.testing.assert_allclose(moved(BONUS) - moved(0.0), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("bonus", "grows"), [(0.0, True), (0.05, False)])
def test_noise_alone(bonus: float, grows: bool) -> None:
    """Rows drawn by their weights, alignments that mean nothing, Adam: as where the specific loss has been learned."""
    optimizer, rule = optax.adam(0.05), filters.importance()

    def step(carry: tuple[Array, optax.OptState], key: Array) -> tuple[tuple[Array, optax.OptState], None]:
        logits, state = carry
        draw, noise = jax.random.split(key)
        rows = rule.select(draw, logits, 8)
        pull = bonus * (logits[rows] - jnp.mean(logits)) if bonus else None
        c = logit_cotangents(
            jax.random.normal(noise, (8,)), logits[rows], "score", num_rows=8, normalize=True, pull=pull
        )
        updates, state = optimizer.update(jnp.zeros(64).at[rows].add(c), state)
        return (optax.apply_updates(logits, updates), state), None  # pyright: ignore[reportReturnType]

    begin = (jnp.zeros(64), optimizer.init(jnp.zeros(64)))
    (logits, _), _ = jax.lax.scan(step, begin, jax.random.split(jax.random.key(0), 4000))
    size = float(filters.effective_sample_size(logits))
    assert (size < 4) == grows, size


@pytest.mark.parametrize("estimator", ["softmax", "score", "uniform"])
def test_the_shift_moves_all_logits_together(estimator: Estimator) -> None:
    """It adds to each row what the row counts for, and κ times the mean in all; the weights themselves stay."""
    before = logit_cotangents(ALIGNMENTS, LOGITS, estimator, num_rows=5)
    shift = shift_pull(BONUS, LOGITS, jnp.ones(()), estimator)
    assert shift is not None
    weights = np.asarray(jax.nn.softmax(LOGITS)) if estimator == "softmax" else np.full(5, 0.2)
    assert float(shift) == pytest.approx(BONUS * float(weights @ np.asarray(LOGITS)), rel=1e-5)
    added = logit_cotangents(ALIGNMENTS, LOGITS, estimator, num_rows=5, shift=shift) - before
    rows = weights * 5 / 4 if estimator == "score" else weights  # which divides by b − 1
    np.testing.assert_allclose(added, rows * float(shift), atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, 0.05])
def test_logits_that_drifted_to_their_bound(pull: float) -> None:
    """Rows with bounded logits that all lie near the bound come back with the pull; without it nothing moves them."""
    optimizer, rule = optax.adam(0.05), filters.importance()
    network = bounded(lambda bias, rows: rows + bias, 4.0)
    spread = jnp.linspace(-1, 1, 64)

    def step(carry: tuple[Array, optax.OptState], key: Array) -> tuple[tuple[Array, optax.OptState], None]:
        bias, state = carry
        draw, noise = jax.random.split(key)
        rows = spread[rule.select(draw, network(bias, spread), 8)]
        logits, pullback = jax.vjp(lambda b: network(b, rows), bias)
        shift = shift_pull(pull, logits, jnp.ones(()), "score")
        c = logit_cotangents(jax.random.normal(noise, (8,)), logits, "score", num_rows=8, normalize=True, shift=shift)
        updates, state = optimizer.update(pullback(c)[0], state)
        return (optax.apply_updates(bias, updates), state), None  # pyright: ignore[reportReturnType]

    begin = (jnp.asarray(-10.0), optimizer.init(jnp.asarray(-10.0)))
    (bias, _), _ = jax.lax.scan(step, begin, jax.random.split(jax.random.key(0), 1000))
    logits = network(bias, spread)
    assert (float(jnp.max(logits) - jnp.min(logits)) > 1.5) == bool(pull), (bias, logits)


@pytest.mark.parametrize("name", ["entropy_bonus", "shift_pull"])
def test_a_strength_that_is_no_number(name: str) -> None:
    given: Any = {name: -1}
    with pytest.raises(UserError, match=f"{name}=-1 must be a number of at least 0"):
        bilevel.make_step(toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(1.0), bilevel.dds(), batch_size=4, **given)
