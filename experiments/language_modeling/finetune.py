"""Fine-tuning: a phase on the specific data alone, stopped by the validation loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.methods import uniform
from bilevel.nn.transformer import language_model_loss
from bilevel.state import TrainState
from bilevel.step.train_step import TrainStep, make_step
from bilevel.training import Checkpoints, LoopConfig, Source, prepare_run_dir, train
from bilevel.training.run_dir import CONFIG_NAME, write_atomically
from bilevel.types import Params
from experiments.language_modeling import build
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.tasks import task_losses
from experiments.runs import CHECKPOINTS, Stopped, read_json
from experiments.sources import open_source, steps_in_call

EVALUATE_EVERY = 100
PATIENCE = 5
NAME = "finetuned.json"
FOLDER = "finetuned"
BEST = "best"
VALID = "specific_valid_loss"

Evaluate = Callable[[Params, Dataset, int | None], float]


class Finetuned(NamedTuple):
    """The best parameters on the validation data."""

    params: Params
    steps: int
    valid_loss: float
    """Nats per byte."""
    seconds: float = 0.0
    """Of all updates, those after the best step too, without compiling, evaluating and saving."""


@dataclass(frozen=True)
class Finetuning:
    """Training on specific rows until the validation loss has not fallen for 5 evaluations; the best parameters are kept."""

    config: Config
    """Its `batch_size`, `micro_batches` and `finetune_learning_rate` count."""
    seed: int
    """Order of the rows."""
    mesh: Mesh
    evaluator: Evaluate
    """(parameters, rows, limit) -> nats per byte."""
    corpora: Corpora

    def __call__(self, params: Params, steps: int, folder: Path) -> Finetuned:
        """Fine-tunes, or continues.

        Args:
          params: where to begin, whole on every device.
          steps: most updates.
          folder: keeps metrics, checkpoints and the best parameters, so that a killed phase goes on.

        Raises:
          Stopped: a signal stopped it before its end.
        """
        settings = {"steps": steps, "learning_rate": self.config.finetune_learning_rate, "seed": self.seed}
        _start_over_if_other(folder, settings)
        prepare_run_dir(folder, settings)
        with Checkpoints(folder / BEST, keep=1) as kept:
            best = _Best(params, self._valid_loss, kept, self.mesh)
            state, step = self._begin(params)
            source = self._source()
            result = train(
                step,
                state,
                data=source,
                config=LoopConfig(
                    steps,
                    log_every=EVALUATE_EVERY,
                    evaluate_every=EVALUATE_EVERY,
                    checkpoint_every=EVALUATE_EVERY,
                    steps_per_call=steps_in_call(source, self.config.steps_per_call),
                    progress=self.config.progress,
                ),
                run_dir=folder,
                evaluate=best.compare,
                until=lambda done: done - best.found.steps >= PATIENCE * EVALUATE_EVERY,
            )
        if result.stop_requested:
            raise Stopped
        return best.found._replace(seconds=result.seconds)

    def results(self, directory: Path, params: Callable[[], Params]) -> dict[str, Any]:
        """What fine-tuning after training gives, kept in the run's directory so that it is done once for the same flags.

        Args:
          directory: of the run.
          params: gives the trained parameters, whole on every device.

        Returns:
          Results of the best step, named finetuned_*; {} without --finetune-steps.

        Raises:
          Stopped: a signal stopped it before its end.
        """
        config, test = self.config, self.corpora.specific["test"]
        if kept := kept_results(config, directory):
            return kept
        best = self(params(), config.finetune_steps, directory / FOLDER)
        results = {
            "finetuned_steps": best.steps,
            "finetuned_specific_valid_loss": best.valid_loss,
            "finetuned_specific_test_loss": self.evaluator(best.params, test, None),
            **task_losses(best.params, self.evaluator, self.corpora, "finetuned_"),
        }
        if jax.process_index() == 0:
            kept = {"settings": settings_of_results(config), "results": results}
            write_atomically(directory / NAME, json.dumps(kept, indent=2) + "\n")
        remove(directory / FOLDER / CHECKPOINTS)
        return results

    def _valid_loss(self, params: Params) -> float:
        return self.evaluator(params, self.corpora.specific["valid"], None)

    def _begin(self, params: Params) -> tuple[TrainState, TrainStep]:
        config, mesh = self.config, self.mesh
        schedule = optax.warmup_constant_schedule(0.0, config.finetune_learning_rate, 50)
        step = make_step(
            language_model_loss(build.build_model(config, mesh)),
            None,
            optax.adam(schedule, b2=0.98),
            None,
            uniform(),
            batch_size=config.batch_size,
            micro_batches=config.micro_batches,
            mesh=mesh if mesh.size > 1 else None,
            gather=build.gathered(config, mesh),
        )

        def create(params: Params) -> TrainState:
            # A copy, as the state is donated.
            return step.init(jax.random.key(self.seed), jax.tree.map(jnp.copy, params), {})

        return build.placed(config, mesh, step, create, params)

    def _source(self) -> Source:
        sharding.check_divides(self.mesh, batch_size=self.config.batch_size)
        loader = Loader(
            self.corpora.specific["train"],
            self.config.batch_size,
            seed=self.seed + 2_000_003,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return open_source(self.config.residence, loader, loader, self.mesh)


class _Best:
    """The best parameters so far, in memory and on disk."""

    def __init__(self, params: Params, valid_loss: Callable[[Params], float], kept: Checkpoints, mesh: Mesh):
        self._valid_loss, self._kept, self._mesh = valid_loss, kept, mesh
        restored = kept.restore_latest({"params": params, VALID: 0.0})
        if restored is None:
            self.found = Finetuned(params, 0, valid_loss(params))
            self._save()
        else:
            steps, best = restored
            self.found = Finetuned(best["params"], steps, float(best[VALID]))

    def compare(self, state: TrainState) -> dict[str, float]:
        """Keeps the parameters if they are better; a step that is evaluated again changes nothing."""
        params = sharding.whole(self._mesh, state.params)
        loss = self._valid_loss(params)
        if loss < self.found.valid_loss:
            steps = int(jax.device_get(state.step))
            self.found = Finetuned(jax.tree.map(jnp.copy, params), steps, loss)
            self._save()
        return {VALID: loss}

    def _save(self) -> None:
        # To the end: several processes cannot have two checkpoints of one step under way.
        self._kept.save(self.found.steps, {"params": self.found.params, VALID: self.found.valid_loss}, wait=True)


def settings_of_results(config: Config) -> dict[str, Any]:
    """The flags that results of fine-tuning after training belong to."""
    return {"steps": config.finetune_steps, "learning_rate": config.finetune_learning_rate}


def kept_results(config: Config, directory: Path) -> dict[str, Any]:
    """The results of fine-tuning that a run's directory has for the same flags; {} if there are none."""
    file = directory / NAME
    kept = read_json(file) if config.finetune_steps and file.exists() else {}
    return kept["results"] if kept.get("settings") == settings_of_results(config) else {}


def _start_over_if_other(folder: Path, settings: dict[str, Any]) -> None:
    """Empties the folder of a phase with other settings."""
    file = folder / CONFIG_NAME
    if file.exists() and read_json(file) != settings:
        remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder; all processes call this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: nobody reads {folder.name}")
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: {folder.name} is removed")
