"""Fine-tuning: a phase on the specific data alone, stopped by the valid set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from bilevel.study import files
from bilevel.study.config import Study, plain
from bilevel.study.context import Context
from bilevel.study.evaluation import measured
from bilevel.study.fitting import Fit
from bilevel.study.task import Model
from bilevel.types import ModelState, Params

EVALUATE_EVERY = 100
PATIENCE = 5
"""Evaluations without a better value after which it ends."""
NAME = "finetuned.json"
FOLDER = "finetuned"


def finetuning(context: Context, model: Model, steps: int, begin: Callable[[], tuple[Params, ModelState]]) -> Fit:
    """Return the training of a model on the specific rows, from trained parameters."""
    study, splits, rate = context.study, context.splits, context.study.finetune.learning_rate
    return Fit(
        study=study, mesh=context.mesh, begin=begin,
        model=model._replace(loss=model.specific_loss),
        optimizer=optax.adam(optax.warmup_constant_schedule(0.0, rate, 50), b2=0.98),
        rows=splits.specific, valid=splits.deciding, evaluate=context.evaluate(model), measure=context.task.measures[0],
        steps=steps, every=EVALUATE_EVERY, patience=PATIENCE * EVALUATE_EVERY,
        seed=context.seed + 2_000_003, key=jax.random.key(context.seed),
        settings={"steps": steps, "learning_rate": rate, "seed": context.seed},
    )  # fmt: skip


def finetuned(context: Context, model: Model, begin: Callable[[], tuple[Params, ModelState]]) -> dict[str, Any]:
    """Return the results of the best step of fine-tuning, named finetuned_*, kept so that it is done once for the same flags.

    Raises:
      Stopped: a signal stopped it before its end.
    """
    study, directory = context.study, context.directory
    if kept := kept_results(study, directory):
        return kept
    fit = finetuning(context, model, study.finetune.steps, begin)
    best, _ = fit(directory / FOLDER)
    found = measured(fit.evaluate, (best.params, best.model_state), context.splits)
    results = {"finetuned_steps": best.steps} | {f"finetuned_{name}": value for name, value in found.items()}
    files.write_json(directory / NAME, {"settings": plain(study.finetune), "results": results})
    files.remove(directory / FOLDER / files.CHECKPOINTS)
    return results


def kept_results(study: Study, directory: Path) -> dict[str, Any]:
    """Return the results of fine-tuning that a run's directory has for the same flags; {} if there are none."""
    file = directory / NAME
    kept = files.read_json(file) if study.finetune.steps and file.exists() else {}
    return kept["results"] if kept.get("settings") == plain(study.finetune) else {}
