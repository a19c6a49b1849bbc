"""The scorer of multilingual DDS: updates against written-out sums, where they rest, and a fit to fixed chances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import samplers
from bilevel.samplers.language_scorer import ESTIMATORS, Estimator, init_scorer, log_chances, scorer_gain
from bilevel.types import UserError

LANGUAGES = 4
AVAILABLE = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]], bool)
REWARDS = np.array([0.5, -0.2, 0.3, 0.9])


def scorer(dtype: Any = np.float32) -> samplers.ScorerParams:
    """A scorer that is not uniform."""
    params, rng = init_scorer(jax.random.key(0), LANGUAGES, 6), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), params)


def written_out(params: samplers.ScorerParams, line: np.ndarray, language: Any) -> Any:
    """log p(i|y_j) of one language and one target, without any masking."""
    hidden = jnp.maximum(jnp.asarray(line, float) @ params.hidden.kernel + params.hidden.bias, 0.0)
    outputs = (hidden @ params.output.kernel + params.output.bias) / 0.7
    there = [i for i in range(LANGUAGES) if line[i]]
    return outputs[language] - jnp.log(sum(jnp.exp(outputs[i]) for i in there))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_update_is_the_written_out_sum(estimator: Estimator) -> None:
    with jax.enable_x64(True):
        params = scorer(np.float64)
        found = jax.grad(scorer_gain)(params, jnp.asarray(AVAILABLE), jnp.asarray(REWARDS), 0.7, estimator)
        wanted = jax.tree.map(jnp.zeros_like, params)
        for line in AVAILABLE:
            for i in np.flatnonzero(line):
                log_chance, gradient = jax.value_and_grad(lambda p, line=line, i=i: written_out(p, line, i))(params)
                factor = REWARDS[i] / len(AVAILABLE)
                factor = factor * jnp.exp(log_chance) if estimator == "policy_gradient" else factor
                factor = max(factor, 0.0) if estimator == "positive_sum" else factor
                wanted = jax.tree.map(lambda x, g, f=factor: x + f * g, wanted, gradient)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    with jax.enable_x64(True):
        params, available = scorer(np.float64), jnp.asarray(AVAILABLE)
        found = jax.grad(scorer_gain)(params, available, jnp.asarray(REWARDS), 0.7, "policy_gradient")

        def expected(params: samplers.ScorerParams) -> Any:
            chances = jnp.exp(log_chances(params, available, 0.7))
            return jnp.sum(chances * jnp.asarray(REWARDS)) / len(AVAILABLE)

        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(jax.grad(expected)(params)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_where_the_updates_lead(estimator: Estimator) -> None:
    """Line 5 rests where p is proportional to the rewards, with negative ones if these count as 0; the policy gradient goes to
    the best language."""
    second = -0.2 if estimator == "positive_sum" else 0.2
    available, rewards = jnp.asarray(AVAILABLE), jnp.asarray([0.5, second, 0.3, 0.9])
    optimizer = optax.adam(0.02)

    @jax.jit
    def climb(params: samplers.ScorerParams) -> samplers.ScorerParams:
        def step(_: Any, carry: Any) -> Any:
            params, state = carry
            loss = lambda p: -scorer_gain(p, available, rewards, 1.0, estimator)  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 3000, step, (params, optimizer.init(params)))[0]

    start = init_scorer(jax.random.key(1), LANGUAGES, 16)
    np.testing.assert_allclose(
        np.exp(log_chances(start, available)), AVAILABLE / AVAILABLE.sum(1, keepdims=True), rtol=1e-6, err_msg="uniform"
    )
    chances = np.exp(log_chances(climb(start), available))
    assert (chances[~AVAILABLE] == 0).all()
    masses = AVAILABLE * np.maximum(rewards, 0)
    if estimator != "policy_gradient":
        np.testing.assert_allclose(chances, masses / masses.sum(1, keepdims=True), atol=0.01)
    else:
        assert (chances[np.arange(len(masses)), masses.argmax(1)] > 0.98).all()


def test_a_scorer_is_fitted_to_fixed_chances() -> None:
    rows = np.where(AVAILABLE, 1, -1)
    logits = np.array([0.465, 0.3, 0.581, 1.0]) / 0.2
    found = samplers.fit_scorer(jax.random.key(0), rows, logits, units=16)
    wanted = np.exp(logits) * AVAILABLE
    chances = np.exp(log_chances(found.params, jnp.asarray(AVAILABLE)))
    np.testing.assert_allclose(chances, wanted / wanted.sum(1, keepdims=True), atol=0.01)
    assert 0 <= found.divergence + 1e-6 < 1e-3


def test_a_fit_to_chances_of_nothing() -> None:
    rows = np.where(AVAILABLE, 1, -1)
    with pytest.raises(
        UserError, match=r"1 of 5 targets \(the first is number 3\) have no language with a logit above −∞"
    ):
        samplers.fit_scorer(jax.random.key(0), rows, [0.0, 0.0, -np.inf, 0.0])
    with pytest.raises(UserError, match="must be finite, or −∞"):
        samplers.fit_scorer(jax.random.key(0), rows, [0.0, 0.0, np.nan, 0.0])
    with pytest.raises(UserError, match=r"shape \(2,\) for 4 languages"):
        samplers.fit_scorer(jax.random.key(0), rows, [0.0, 0.0])
