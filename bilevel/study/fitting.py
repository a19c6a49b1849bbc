"""What is trained for its best on valid: models that score rows, and fine-tuning on the specific rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from bilevel.data import Dataset
from bilevel.devices import sharding
from bilevel.devices.processes import remove_folder
from bilevel.study.config import Study
from bilevel.study.context import Context
from bilevel.study.judging import FINETUNED_OUTPUTS, judged, judges
from bilevel.study.task import Evaluate, Measure, Model
from bilevel.training.checkpoints import CHECKPOINTS_NAME
from bilevel.training.evaluation import measured
from bilevel.training.fit import Fit
from bilevel.training.optimizers import optimizer_of
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.settings import plain
from bilevel.types import ModelState, Params

NAME = "finetuned.json"
FOLDER = "finetuned"
EVALUATE_EVERY = 100
PATIENCE = 5
"""Evaluations without a better value after which training ends."""
_LOSS = Measure("loss", "loss")


def fit_of(
    study: Study, mesh: Mesh, model: Model, evaluate: Evaluate, rows: Dataset, valid: Dataset, about: Any, *, steps: int,
    seed: int, measure: Measure = _LOSS,
) -> Fit:  # fmt: skip
    """Return a model to train from its beginning with the optimizer of the study, until valid does not fall any more.

    `about` is what tells this model from others: the task's settings and the network.

    Reference: RHO-LOSS as published at ICML 2022, where the irreducible-loss model with the lowest validation loss is kept; its
    first version (RHOLS), whose numbers are given elsewhere, does not say which.
    """
    key, step_key = jax.random.split(jax.random.key(seed))
    settings = {
        **plain(about), "steps": steps, "seed": seed, "count": len(rows), "rows": rows.content_hash,
        "valid": valid.content_hash, "batch_size": study.batch_size, "optimizer": plain(study.optimizer),
    }  # fmt: skip

    def begin() -> tuple[Params, ModelState]:
        start = {} if model.start is None else model.start()
        created = jax.jit(lambda start: model.first(key, start), out_shardings=sharding.everywhere(mesh))
        return created(sharding.place_tree(mesh, start, split=False))

    return _fit(
        study, mesh, model, evaluate, valid, measure, rows=rows, steps=steps,
        optimizer=optimizer_of(study.optimizer, steps), seed=seed, key=step_key, settings=settings,
        begin=begin,
    )  # fmt: skip


def finetuning(
    context: Context, model: Model, evaluate: Evaluate, steps: int, begin: Callable[[], tuple[Params, ModelState]]
) -> Fit:
    """Return the training of a model on the specific rows, from trained parameters."""
    study, splits, rate = context.study, context.splits, context.study.finetune.learning_rate
    return _fit(
        study, context.mesh, model._replace(loss=model.specific_loss), evaluate, splits.deciding,
        context.task.measures[0], rows=splits.specific, begin=begin, steps=steps,
        optimizer=optax.adam(optax.warmup_constant_schedule(0.0, rate, 50), b2=0.98),
        seed=context.seed + 2_000_003, key=jax.random.key(context.seed),
        settings={"steps": steps, "learning_rate": rate, "seed": context.seed},
    )  # fmt: skip


def _fit(
    study: Study, mesh: Mesh, model: Model, evaluate: Evaluate, valid: Dataset, measure: Measure, **fields: Any
) -> Fit:
    return Fit(
        loss=model.loss, gather=model.gather, measure=lambda params, model_state: evaluate(params, model_state, valid, None),
        every=EVALUATE_EVERY, patience=PATIENCE * EVALUATE_EVERY,
        decides=measure.name, title=measure.title, digits=measure.digits, sign=measure.sign, mesh=mesh,
        batch_size=study.batch_size, micro_batches=study.micro_batches, split=study.shard_state, residence=study.residence,
        steps_per_call=study.steps_per_call, progress=study.progress, **fields,
    )  # fmt: skip


def finetuned(context: Context, model: Model, begin: Callable[[], tuple[Params, ModelState]]) -> dict[str, Any]:
    """Return the results of fine-tuning a trained model, named finetuned_*.

    They are of its best step, and kept so that it is done once for the same flags.

    Raises:
      Stopped: a signal stopped it before its end.
    """
    study, directory = context.study, context.directory
    lacks_texts = judges(context) and not (directory / FINETUNED_OUTPUTS).exists()
    if (kept := kept_results(study, directory)) and not lacks_texts:
        return kept
    evaluate = context.evaluate(model)
    best, _ = finetuning(context, model, evaluate, study.finetune.steps, begin)(directory / FOLDER)
    state = (best.params, best.model_state)
    found = measured(evaluate, state, context.splits.measured()) | judged(
        context, model, lambda: state, FINETUNED_OUTPUTS
    )
    results = {"finetuned_steps": best.steps} | {f"finetuned_{name}": value for name, value in found.items()}
    write_json(directory / NAME, {"settings": plain(study.finetune), "results": results})
    remove_folder(directory / FOLDER / CHECKPOINTS_NAME)
    return results


def kept_results(study: Study, directory: Path) -> dict[str, Any]:
    """Return the results of fine-tuning that a run's directory has for the same flags; {} if there are none."""
    file = directory / NAME
    kept = read_json(file) if study.finetune.steps and file.exists() else {}
    return kept["results"] if kept.get("settings") == plain(study.finetune) else {}
