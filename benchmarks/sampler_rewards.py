"""Whether the policy of RLSampler can find right labels by its rewards, on a task made for that.

    python -m benchmarks.sampler_rewards [--entropy-bonuses 0,0.01] [--json FILE]

Rows are points of two Gaussian classes; some of them have the label of the other class. A linear classifier keeps `keep` of
its parameters on each step, so that the loss on valid depends most on the rows just drawn; each reward follows few draws, and
each row gets many rewards. Table: the share of right labels among the draws, in the first and the last tenth of the steps;
the effective sample size of the policy, the rows drawn at all and the valid loss in the last tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.step_cost import show
from bilevel import make_sampled_step, samplers
from bilevel.types import Array, Batch, LossAux, ModelState, Params

CLASSES, FEATURES = 2, 10


@dataclass(frozen=True)
class RewardsConfig:
    """The task, and the settings of the sampler."""

    rows: int = 100
    """Rows to draw from."""
    wrong: float = 0.43
    """Share of them with a wrong label."""
    valid: int = 100
    """Rows of the reward, all with right labels."""
    noise: float = 1.0
    """Standard deviation of a point about the centre of its class; centres are standard normal."""
    steps: int = 4000
    """θ-updates."""
    batch_size: int = 10
    """Draws for each θ-update."""
    learning_rate: float = 0.5
    """Of θ, by plain SGD."""
    keep: float = 0.1
    """What remains of θ in the next step beside its update: 1 forgets nothing."""
    reward_every: int = 1
    """θ-updates for each reward (T2)."""
    policy_every: int = 10
    """θ-updates for each update of the policy (T1)."""
    policy_learning_rate: float = 0.01
    """Of the policy, by Adam."""
    entropy_bonuses: str = "0"
    """Weights of the policy's entropy, comma-separated."""
    seeds: str = "0,1"
    """Seeds of the task and of all draws, comma-separated."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


def main(config: RewardsConfig) -> None:
    """Print the table: uniform draws, then each bonus, for each seed."""
    bonuses = [float(bonus) for bonus in config.entropy_bonuses.split(",")]
    seeds = [int(seed) for seed in config.seeds.split(",")]
    show([measure(config, seed, bonus) for seed in seeds for bonus in (None, *bonuses)], COLUMNS, config.json)


COLUMNS = {
    "sampler": "sampler", "seed": "seed", "right_first": "right labels, first tenth", "right_last": "last tenth",
    "effective_sample_size": "effective sample size", "distinct": "rows drawn", "validation_loss": "valid loss",
}  # fmt: skip


def measure(config: RewardsConfig, seed: int, bonus: float | None) -> dict[str, Any]:
    """Train once, by rl_sampler with an entropy bonus or (None) by uniform draws."""
    data, validation, wrong = task(config, seed)
    if bonus is None:
        sampler = samplers.uniform(config.rows, config.batch_size)
    else:
        sampler = samplers.rl_sampler(
            config.rows, config.batch_size, CLASSES, update_every=config.policy_every, reward_every=config.reward_every,
            learning_rate=config.policy_learning_rate, entropy_bonus=bonus,
            summary_size=16, logger_size=32, policy_size=32,
        )  # fmt: skip
    forgets = optax.add_decayed_weights((1 - config.keep) / config.learning_rate)
    run = make_sampled_step(sampler, loss, optax.chain(forgets, optax.sgd(config.learning_rate)))

    @jax.jit
    def train(key: Array) -> dict[str, Array]:
        def step(state: Any, _: None) -> tuple[Any, dict[str, Array]]:
            state, metrics = run.step(state, data, validation)
            after = jnp.mean(loss(state.params, {}, validation, key)[0])
            kept = {name: metrics[name] for name in ("selected", "effective_sample_size")}
            return state, {**kept, "validation_loss": after}

        begin = {"kernel": jnp.zeros((FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)}
        return jax.lax.scan(step, run.init(key, begin), None, length=config.steps)[1]

    found, tenth = jax.device_get(train(jax.random.key(seed))), max(1, config.steps // 10)
    right, last = ~wrong[found["selected"]], slice(-tenth, None)
    return {
        "sampler": "uniform" if bonus is None else f"rl_sampler, entropy bonus {bonus:g}", "seed": seed,
        "right_first": float(right[:tenth].mean()), "right_last": float(right[last].mean()),
        "effective_sample_size": float(found["effective_sample_size"][last].mean()),
        "distinct": len(np.unique(found["selected"][last])),
        "validation_loss": float(found["validation_loss"][last].mean()),
    }  # fmt: skip


def task(config: RewardsConfig, seed: int) -> tuple[Batch, Batch, np.ndarray]:
    """Draw the rows, those of valid, and which of the rows have a wrong label."""
    draws = np.random.default_rng(seed)
    centres = draws.normal(size=(CLASSES, FEATURES))

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = draws.integers(CLASSES, size=count)
        return (centres[labels] + config.noise * draws.normal(size=(count, FEATURES))).astype(np.float32), labels

    points, labels = rows(config.rows)
    wrong = draws.permutation(config.rows) < round(config.wrong * config.rows)
    given = np.where(wrong, (labels + 1) % CLASSES, labels)
    valid, right = rows(config.valid)
    data, validation = (
        {"x": jnp.asarray(x), "label": jnp.asarray(y, jnp.int32)} for x, y in ((points, given), (valid, right))
    )
    return data, validation, wrong


def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
    """Cross-entropy of a linear classifier."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses, LossAux(model_state, {"logits": logits})


if __name__ == "__main__":
    main(tyro.cli(RewardsConfig))
