"""Training on some rows for what is best on valid: models that score rows, and fine-tuning on the specific rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.methods import uniform
from bilevel.state import TrainState
from bilevel.step import make_step
from bilevel.study import files
from bilevel.study.config import Study, plain
from bilevel.study.context import Context, optimizer_of
from bilevel.study.evaluation import measured
from bilevel.study.task import Evaluate, Measure, Model
from bilevel.training import Checkpoints, LoopConfig, prepare_run_dir, train
from bilevel.training.best import Best, KeepBest
from bilevel.training.opening import open_source, steps_in_call
from bilevel.training.run_dir import CONFIG_NAME
from bilevel.types import Array, ModelState, Params

BEST = "best"
"""In the folder of a fit: a checkpoint of the best parameters."""
NAME = "finetuned.json"
FOLDER = "finetuned"
EVALUATE_EVERY = 100
PATIENCE = 5
"""Evaluations without a better value after which training ends."""
_LOSS = Measure("loss", "loss")


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """A model to train on some rows alone, for the parameters that are best on valid."""

    study: Study
    mesh: Mesh
    model: Model
    begin: Callable[[], tuple[Params, ModelState]]
    """Makes the first parameters and the model state, whole on every device."""
    optimizer: optax.GradientTransformation
    rows: Dataset
    valid: Dataset
    evaluate: Evaluate
    measure: Measure
    """What decides, on valid, which parameters are best."""
    steps: int
    """Most updates; it ends before if valid does not fall for `PATIENCE` evaluations."""
    seed: int
    """Of the order of the rows."""
    key: Array
    """Of the draws in the steps."""
    settings: Mapping[str, Any]
    """What the outcome depends on, as JSON values."""

    def __call__(self, folder: Path) -> tuple[Best, float]:
        """Train, or continue, in a folder; one of other settings is emptied.

        Returns:
          The best parameters, and the seconds of all updates: without compiling, evaluating and saving.

        Raises:
          Stopped: a signal stopped it after saving.
        """
        if (folder / CONFIG_NAME).exists() and files.recorded(folder) not in ({}, self.settings):
            files.remove(folder)
        prepare_run_dir(folder, self.settings)
        study, mesh, parts = self.study, self.mesh, self.mesh.size * self.study.micro_batches
        size = min(study.batch_size, len(self.rows)) // parts * parts or parts
        step = make_step(
            self.model.loss, None, self.optimizer, None, uniform(), batch_size=size, micro_batches=study.micro_batches,
            mesh=mesh if mesh.size > 1 else None, gather=self.model.gather,
        )  # fmt: skip

        def create(params: Params, model_state: ModelState) -> TrainState:
            # A copy, as the state is donated.
            return step.init(self.key, jax.tree.map(jnp.copy, params), {}, model_state)

        begin = self.begin()
        state, step = sharding.placed(mesh, step, create, *begin, split=study.shard_state)
        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        loader = Loader(self.rows, size, seed=self.seed, **hosts)
        source = open_source(study.residence, loader, loader, mesh)
        loop = LoopConfig(
            self.steps, log_every=EVALUATE_EVERY, evaluate_every=EVALUATE_EVERY, checkpoint_every=EVALUATE_EVERY,
            steps_per_call=steps_in_call(source, study.steps_per_call), progress=study.progress,
        )  # fmt: skip
        with Checkpoints(folder / BEST, keep=1) as saved:
            best = KeepBest(self._measure, self.measure.name, begin, saved, mesh, self.measure.sign)
            result = train(
                step, state, data=source, config=loop, run_dir=folder, evaluate=best.compare,
                until=best.waited(PATIENCE * EVALUATE_EVERY),
            )  # fmt: skip
        if result.stop_requested:
            raise files.Stopped
        return best.best, result.seconds

    def _measure(self, params: Params, model_state: ModelState) -> Mapping[str, float]:
        return self.evaluate(params, model_state, self.valid, None)


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
    return Fit(
        study=study, mesh=mesh, model=model, optimizer=optimizer_of(study.optimizer, steps),
        begin=lambda: jax.jit(lambda: model.init(key), out_shardings=sharding.everywhere(mesh))(),
        rows=rows, valid=valid, evaluate=evaluate, measure=measure, steps=steps, seed=seed, key=step_key, settings=settings,
    )  # fmt: skip


def finetuning(context: Context, model: Model, steps: int, begin: Callable[[], tuple[Params, ModelState]]) -> Fit:
    """Return the training of a model on the specific rows, from trained parameters."""
    study, splits, rate = context.study, context.splits, context.study.finetune.learning_rate
    return Fit(
        study=study, mesh=context.mesh, model=model._replace(loss=model.specific_loss), begin=begin,
        optimizer=optax.adam(optax.warmup_constant_schedule(0.0, rate, 50), b2=0.98),
        rows=splits.specific, valid=splits.deciding, evaluate=context.evaluate(model), measure=context.task.measures[0],
        steps=steps, seed=context.seed + 2_000_003,
        key=jax.random.key(context.seed), settings={"steps": steps, "learning_rate": rate, "seed": context.seed},
    )  # fmt: skip


def finetuned(context: Context, model: Model, begin: Callable[[], tuple[Params, ModelState]]) -> dict[str, Any]:
    """Return the results of fine-tuning a trained model, named finetuned_*.

    They are of its best step, and kept so that it is done once for the same flags.

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
