"""Fine-tuning: a last phase on the specific data alone, stopped by the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.data import Dataset, Loader
from bilevel.methods import uniform
from bilevel.nn.transformer import Transformer, language_model_loss
from bilevel.step import make_step
from bilevel.types import Array, Batch, Params
from experiments.language_modeling.build import Corpora
from experiments.language_modeling.config import Config
from experiments.language_modeling.tasks import task_losses

EVALUATE_EVERY = 100
PATIENCE = 5


def finetune(
    config: Config,
    seed: int,
    params: Params,
    model: Transformer,
    evaluator: Callable[[Params, Dataset, int | None], float],
    corpora: Corpora,
) -> dict[str, Any]:
    """Trains on specific rows until the validation loss has not fallen for 5 evaluations, and keeps the best parameters.

    Returns:
      Results of the best step, named finetuned_*; {} without --finetune-steps.
    """
    if not config.finetune_steps:
        return {}

    def no_weights(weight_params: Params, batch: Batch) -> Array:
        return jnp.zeros(batch["tokens"].shape[0])

    optimizer = optax.adam(optax.warmup_constant_schedule(0.0, config.finetune_learning_rate, 50), b2=0.98)
    init, step, *_ = make_step(
        language_model_loss(model), no_weights, optimizer, optax.identity(), uniform(), batch_size=config.batch_size
    )
    state = jax.jit(init)(jax.random.key(seed), params, {})
    step = jax.jit(step, donate_argnums=0)
    loader = Loader(corpora.specific["train"], config.batch_size, seed=seed + 2_000_003)
    valid = corpora.specific["valid"]
    best, best_loss, best_step = params, evaluator(params, valid, None), 0
    for number in range(config.finetune_steps):
        batch = loader.batch(number)
        state, _ = step(state, batch, batch)
        if (number + 1) % EVALUATE_EVERY == 0 or number + 1 == config.finetune_steps:
            loss = evaluator(state.params, valid, None)
            if loss < best_loss:
                best, best_loss, best_step = jax.tree.map(jnp.copy, state.params), loss, number + 1
            elif number + 1 - best_step >= PATIENCE * EVALUATE_EVERY:
                break
    return {
        "finetuned_steps": best_step,
        "finetuned_specific_valid_loss": best_loss,
        "finetuned_specific_test_loss": evaluator(best, corpora.specific["test"], None),
        **task_losses(best, evaluator, corpora, "finetuned_"),
    }
