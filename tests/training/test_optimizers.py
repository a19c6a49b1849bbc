"""The optimizers and schedules that --optimizer names: expected moves in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.training.optimizers import OptimizerConfig, optimizer_of


def moves(config: OptimizerConfig, steps: int, at: float = 0.0, length: int | None = None) -> list[float]:
    """What each update adds where the gradient is always 1."""
    optimizer, x = optimizer_of(config, length or steps), jnp.asarray(at)
    state, found = optimizer.init(x), []
    for _ in range(steps):
        move, state = optimizer.update(jnp.ones(()), state, x)
        found.append(float(jnp.asarray(move)))
    return found


def sgd(**given: object) -> OptimizerConfig:
    return OptimizerConfig(**{"name": "sgd", "learning_rate": 1.0, "momentum": 0.0, **given})  # pyright: ignore


@pytest.mark.parametrize(("warmup", "wanted"), [(0, [1, 1, 0.1, 0.1, 0.01]), (1, [0, 1, 0.1, 0.1, 0.01])])
def test_rates_in_steps(warmup: int, wanted: list[float]) -> None:
    """A tenth of the rate from the third update on, and a hundredth from the fifth on."""
    found = moves(sgd(schedule="step", milestones=(2, 4), warmup=warmup), 5)
    np.testing.assert_allclose(found, -np.asarray(wanted), rtol=1e-5)
    found = moves(sgd(schedule="step", milestones=(2,), decay=0.5), 3)
    np.testing.assert_allclose(found, [-1, -1, -0.5], rtol=1e-5)


def test_a_cosine_after_the_warmup() -> None:
    steps, warmup = 12, 4
    at = np.arange(steps)
    wanted = np.where(at < warmup, at / warmup, 0.5 * (1 + np.cos(np.pi * (at - warmup) / (steps - warmup))))
    np.testing.assert_allclose(moves(sgd(schedule="cosine", warmup=warmup), steps), -wanted, rtol=1e-5, atol=1e-7)


def test_the_warmup_is_at_most_half_of_the_steps() -> None:
    np.testing.assert_allclose(moves(sgd(warmup=100), 6), [-0, -1 / 3, -2 / 3, -1, -1, -1], rtol=1e-5, atol=1e-7)


def test_a_schedule_may_end_after_the_run() -> None:
    config = sgd(schedule="cosine")
    np.testing.assert_allclose(moves(config, 3, length=9), moves(config, 9)[:3])


def test_momentum_with_and_without_nesterov() -> None:
    """The second update is 1 + m, with Nesterov 1 + m + m²."""
    np.testing.assert_allclose(moves(sgd(momentum=0.5), 2), [-1.5, -1.75])
    np.testing.assert_allclose(moves(sgd(momentum=0.5, nesterov=False), 2), [-1, -1.5])


def test_weight_decay() -> None:
    """sgd adds it to the gradient, adamw to Adam's move of one learning rate, and adam has none."""
    np.testing.assert_allclose(moves(sgd(weight_decay=0.1), 1, at=2.0), [-1.2], rtol=1e-5)
    for name, wanted in (("adamw", -0.5 * 1.2), ("adam", -0.5)):
        config = OptimizerConfig(name=name, learning_rate=0.5, weight_decay=0.1)  # pyright: ignore
        np.testing.assert_allclose(moves(config, 1, at=2.0), [wanted], rtol=1e-4)
