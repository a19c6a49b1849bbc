"""Multilingual DDS finds the kin: a cipher with a tenth of its letters changed, against a cipher of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import samplers
from bilevel.data import ArrayDataset
from bilevel.training import LoopConfig, Sampled, train
from bilevel.types import Array, LossAux

LETTERS, LENGTH, TARGETS = 20, 12, 300
NAMES = ("specific", "stranger", "kin")


def pairs(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Rows of letters and their cipher, the table of rows by target, and dev rows of the specific language."""
    rng = np.random.default_rng(seed)
    often = rng.dirichlet(np.full(LETTERS, 2.0))
    specific, stranger = rng.permutation(LETTERS), rng.permutation(LETTERS)
    kin, changed = specific.copy(), rng.permutation(LETTERS)[: LETTERS // 10]
    kin[changed] = np.roll(kin[changed], 1)
    ciphers = np.stack([specific, stranger, kin])
    targets = rng.choice(LETTERS, (TARGETS, LENGTH), p=often)
    available = np.stack([rng.random(TARGETS) < 0.05, np.ones(TARGETS), np.ones(TARGETS)], axis=1).astype(bool)
    table = np.where(available, np.cumsum(available).reshape(available.shape) - 1, -1)
    which, language = np.nonzero(available)
    train = {"target": targets[which], "source": ciphers[language[:, None], targets[which]]}
    held_out = rng.choice(LETTERS, (40, LENGTH), p=often)
    return train, table, {"target": held_out, "source": specific[held_out]}


def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    """A table from each letter of a source to the logits of a target's."""
    logs = jax.nn.log_softmax(params["letters"][batch["source"]])
    return -jnp.take_along_axis(logs, batch["target"][..., None], -1)[..., 0].mean(1), LossAux(model_state, {})


@pytest.mark.parametrize("options", [{}, {"estimator": "policy_gradient"}, {"specific_rows": "train"}])
def test_the_kin_is_drawn_more_often_than_the_stranger(options: dict[str, Any]) -> None:
    params = {"letters": jnp.zeros((LETTERS, LETTERS))}
    for seed in range(2):
        rows, table, dev = pairs(seed)
        sampler = samplers.multilingual_dds(
            table, len(rows["target"]), 16, params, 0, names=NAMES, targets_per_round=100, scorer_steps=10,
            scorer_batch_size=32, learning_rate=0.01, reward_scale=0.01, **options,
        )  # fmt: skip
        run = bilevel.make_sampled_step(sampler, loss, optax.adam(0.02))
        data = Sampled(ArrayDataset(rows), ArrayDataset(dev))
        config = LoopConfig(num_steps=160, log_every=40, steps_per_call=8)
        found = train(run, run.init(jax.random.key(seed), params), data=data, config=config)
        first, last = found.history[0], found.history[-1]
        assert last["chance/kin"] > last["chance/stranger"] + 0.2
        assert last["reward/kin"] > last["reward/stranger"]
        assert last["drawn/kin"] > first["drawn/kin"]
        assert last["generic_loss"] < first["generic_loss"]
