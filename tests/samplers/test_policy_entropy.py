"""The entropy bonus of RLSampler: what it adds, and that noise alone does not narrow a policy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import samplers
from bilevel.samplers.reinforce import Window, log_probabilities, policy_loss
from bilevel.types import Array

ROWS, BATCH = 12, 3


def sampler(**options: Any) -> samplers.Sampler:
    sizes = {"summary_size": 2, "logger_size": 3, "policy_size": 3}
    return samplers.rl_sampler(ROWS, BATCH, 2, update_every=4, reward_every=2, **sizes, **options)


def test_the_bonus_is_the_entropy_of_all_draws() -> None:
    rng = np.random.default_rng(0)
    params = sampler(policy_linear_scale=1.0, logger_linear_scale=1.0).init(jax.random.key(0)).params
    window = Window(
        jnp.asarray(rng.normal(size=2), jnp.float32), jnp.asarray(rng.integers(0, ROWS, (4, BATCH)), jnp.int32),
        jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), jnp.asarray([0.1, -0.2], jnp.float32),
    )  # fmt: skip
    # The probability of every row in each draw: the log-probabilities, had that row been drawn.
    every = [
        log_probabilities(params, window._replace(draws=jnp.full((4, BATCH), row, jnp.int32)))[0] for row in range(ROWS)
    ]
    chances = np.exp(np.stack(every))
    np.testing.assert_allclose(chances.sum(0), 1, rtol=1e-5)
    wanted = -(chances * np.log(chances)).sum(0)
    np.testing.assert_allclose(log_probabilities(params, window)[1], wanted, rtol=1e-5)
    added = policy_loss(params, window, 0.5) - policy_loss(params, window)
    np.testing.assert_allclose(added, -0.5 * wanted.mean(1).sum(), rtol=1e-4)


@pytest.mark.parametrize(("bonus", "narrow"), [(0.0, True), (0.03, False)])
def test_rewards_of_noise_narrow_a_policy_without_it(bonus: float, narrow: bool) -> None:
    chosen = sampler(entropy_bonus=bonus)
    observe, reward, learn = chosen.observe, chosen.reward, chosen.learn
    assert observe is not None
    assert reward is not None
    assert learn is not None

    def window(state: Any, key: Array) -> tuple[Any, Array]:
        size = jnp.zeros(())
        for i, k in enumerate(jax.random.split(key, 4)):
            _, state, metrics = chosen.draw(state)
            size = metrics["effective_sample_size"]
            state = observe(state, jnp.ones((BATCH, 2)))
            if i % 2:
                state, _ = reward(state, 0.5 + 0.1 * jax.random.normal(k))
        return learn(state)[0], size

    begin = chosen.init(jax.random.key(3))
    _, sizes = jax.jit(lambda state: jax.lax.scan(window, state, jax.random.split(jax.random.key(2), 1000)))(begin)
    assert (float(sizes[-1]) < 2) == narrow, sizes[-1]
    assert narrow or float(sizes[-1]) > ROWS / 2


def test_a_bonus_below_zero() -> None:
    with pytest.raises(ValueError, match=r"entropy_bonus=-1\.0 must not be negative"):
        sampler(entropy_bonus=-1.0)
