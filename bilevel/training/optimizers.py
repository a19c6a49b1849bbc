"""The optimizer of θ and its schedule, from a few settings.

optimizer = optimizer_of(OptimizerConfig(name="sgd", learning_rate=0.1, schedule="cosine", warmup=100), steps=3000)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from bilevel.training.settings import Rate
from bilevel.types import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of θ."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule."""
    learning_rate: Rate = 2e-3
    """Peak learning rate."""
    b2: float = 0.999
    """adam, adamw: decay of the second moment."""
    momentum: float = 0.9
    """sgd: its momentum."""
    nesterov: bool = True
    """sgd: Nesterov momentum."""
    weight_decay: float = 0.0
    """Decoupled (adamw), or added to the gradient (sgd); adam has none."""
    schedule: Literal["constant", "cosine", "step", "rsqrt"] = "constant"
    """After warm-up: constant, cosine decay to 0, multiplied by --optimizer.decay at each milestone (step), or falling as
    1/√steps (rsqrt)."""
    milestones: tuple[int, ...] = ()
    """step: θ-updates, counted from the first, after which the learning rate changes."""
    decay: PositiveFloat = 0.1
    """step: factor of each change."""
    warmup: NonNegativeInt = 0
    """Steps of warm-up, at most half of all."""
    average: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Evaluate a moving average of the parameters and BatchNorm statistics with this decay (DDS: 0.999); 0: the last ones."""

    def check(self) -> None:
        """Refuse milestones that do not fit, by a UserError."""
        given = " ".join(map(str, self.milestones))
        if (self.schedule == "step") != bool(self.milestones):
            found = f"--optimizer.milestones {given} with" if given else "No --optimizer.milestones with"
            raise UserError(
                f"{found} --optimizer.schedule {self.schedule}: give both, as in --optimizer.schedule step "
                "--optimizer.milestones 50000 75000, or neither."
            )
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise UserError(
                f"--optimizer.milestones {given} must be numbers of steps from 1 on, each larger than the one before."
            )


def optimizer_of(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer of θ; its schedule has this many steps."""
    rate = _rate(config, min(config.warmup, steps // 2), steps)
    if config.name == "adamw":
        return optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay)
    if config.name == "adam":
        return optax.adam(rate, b2=config.b2)
    momentum = optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), momentum)


def _rate(config: OptimizerConfig, warmup: int, steps: int) -> optax.ScalarOrSchedule:
    peak = config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    warm = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else None
    if config.schedule == "constant":
        return warm or peak
    if config.schedule == "rsqrt":
        first = max(warmup, 1)
        return lambda count: peak * jnp.minimum((count + 1) / first, jnp.sqrt(first / (count + 1)))
    factor = optax.piecewise_constant_schedule(1.0, dict.fromkeys(config.milestones, config.decay))
    return lambda count: (warm(count) if warm else peak) * factor(count)
