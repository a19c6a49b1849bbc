"""Fine-tuning: a phase on the specific data alone, stopped by the validation loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.data import Dataset, Loader
from bilevel.methods import uniform
from bilevel.nn.transformer import Transformer, language_model_loss
from bilevel.step import make_step
from bilevel.training.run_dir import write_atomically
from bilevel.types import Params
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.tasks import task_losses
from experiments.runs import read_json

EVALUATE_EVERY = 100
PATIENCE = 5
NAME = "finetuned.json"

Evaluate = Callable[[Params, Dataset, int | None], float]


class Finetuned(NamedTuple):
    """The best parameters on the validation data."""

    params: Params
    steps: int
    valid_loss: float
    """Nats per byte."""


def finetune(
    config: Config, seed: int, params: Params, model: Transformer, evaluator: Evaluate, corpora: Corpora, steps: int
) -> Finetuned:
    """Trains on specific rows until the validation loss has not fallen for 5 evaluations, and keeps the best parameters.

    Args:
      config: its `batch_size` and `finetune_learning_rate` count.
      seed: order of the rows.
      params: where to begin.
      model: the main model.
      evaluator: (parameters, rows, limit) -> nats per byte.
      corpora: the specific data.
      steps: most updates.
    """
    optimizer = optax.adam(optax.warmup_constant_schedule(0.0, config.finetune_learning_rate, 50), b2=0.98)
    init, step, *_ = make_step(
        language_model_loss(model), None, optimizer, None, uniform(), batch_size=config.batch_size
    )
    state = jax.jit(init)(jax.random.key(seed), params, {})
    step = jax.jit(step, donate_argnums=0)
    loader = Loader(corpora.specific["train"], config.batch_size, seed=seed + 2_000_003)
    valid = corpora.specific["valid"]
    best = Finetuned(params, 0, evaluator(params, valid, None))
    for number in range(steps):
        batch = loader.batch(number)
        state, _ = step(state, batch, batch)
        if (number + 1) % EVALUATE_EVERY == 0 or number + 1 == steps:
            loss = evaluator(state.params, valid, None)
            if loss < best.valid_loss:
                best = Finetuned(jax.tree.map(jnp.copy, state.params), number + 1, loss)
            elif number + 1 - best.steps >= PATIENCE * EVALUATE_EVERY:
                break
    return best


def finetuned_results(
    config: Config,
    seed: int,
    directory: Path,
    params: Callable[[], Params],
    model: Transformer,
    evaluator: Evaluate,
    corpora: Corpora,
) -> dict[str, Any]:
    """What fine-tuning after training gives, kept in the run's directory so that it is done once for the same flags.

    Args:
      config: without `finetune_steps` there is nothing to do.
      seed: of the run.
      directory: of the run.
      params: gives the trained parameters.
      model: the main model.
      evaluator: (parameters, rows, limit) -> nats per byte.
      corpora: the specific data.

    Returns:
      Results of the best step, named finetuned_*; {} without --finetune-steps.
    """
    if not config.finetune_steps:
        return {}
    settings = {"steps": config.finetune_steps, "learning_rate": config.finetune_learning_rate}
    file = directory / NAME
    kept = read_json(file) if file.exists() else {}
    if kept.get("settings") == settings:
        return kept["results"]
    best = finetune(config, seed, params(), model, evaluator, corpora, config.finetune_steps)
    results = {
        "finetuned_steps": best.steps,
        "finetuned_specific_valid_loss": best.valid_loss,
        "finetuned_specific_test_loss": evaluator(best.params, corpora.specific["test"], None),
        **task_losses(best.params, evaluator, corpora, "finetuned_"),
    }
    if jax.process_index() == 0:
        write_atomically(file, json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    return results
