"""Fine-tuning: a phase on the specific data alone, stopped by the valid set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from bilevel.data import Loader
from bilevel.devices import sharding
from bilevel.methods import uniform
from bilevel.state import TrainState
from bilevel.step import TrainStep, make_step
from bilevel.study import files
from bilevel.study.config import plain
from bilevel.study.context import Context, local
from bilevel.study.evaluation import measured, named
from bilevel.study.feeding import open_source, steps_in_call
from bilevel.study.placing import placed
from bilevel.study.task import Model
from bilevel.training import Checkpoints, LoopConfig, Source, prepare_run_dir, train
from bilevel.training.run_dir import CONFIG_NAME
from bilevel.types import ModelState, Params

EVALUATE_EVERY = 100
PATIENCE = 5
NAME = "finetuned.json"
FOLDER = "finetuned"
BEST = "best"
_VALUE = "valid"


class Finetuned(NamedTuple):
    """The best parameters on the valid set."""

    params: Params
    model_state: ModelState
    steps: int
    value: float
    """Of the deciding measure."""
    seconds: float = 0.0
    """Of all updates, those after the best step too, without compiling, evaluating and saving."""


@dataclass(frozen=True, eq=False)
class Finetuning:
    """Training on specific rows until the deciding measure has not improved for 5 evaluations; the best state is kept."""

    context: Context
    model: Model

    def __call__(self, begin: tuple[Params, ModelState], steps: int, folder: Path) -> Finetuned:
        """Fine-tune, or continue.

        Args:
          begin: parameters and model state, whole on every device.
          steps: most updates.
          folder: keeps metrics, checkpoints and the best parameters, so that a killed phase goes on.

        Raises:
          Stopped: a signal stopped it before its end.
        """
        study = self.context.study
        settings = {"steps": steps, "learning_rate": study.finetune.learning_rate, "seed": self.context.seed}
        _start_over_if_other(folder, settings)
        prepare_run_dir(folder, settings)
        with Checkpoints(folder / BEST, keep=1) as kept:
            best = _Best(begin, self._value, kept, self.context)
            state, step = self._begin(begin)
            source = self._source()
            loop = LoopConfig(
                steps, log_every=EVALUATE_EVERY, evaluate_every=EVALUATE_EVERY, checkpoint_every=EVALUATE_EVERY,
                steps_per_call=steps_in_call(source, study.steps_per_call), progress=study.progress,
            )  # fmt: skip
            result = train(
                step,
                state,
                data=source,
                config=loop,
                run_dir=folder,
                evaluate=best.compare,
                until=lambda done: done - best.found.steps >= PATIENCE * EVALUATE_EVERY,
            )
        if result.stop_requested:
            raise files.Stopped
        return best.found._replace(seconds=result.seconds)

    def results(self, directory: Path, begin: Callable[[], tuple[Params, ModelState]]) -> dict[str, Any]:
        """Return what fine-tuning after training gives, kept so that it is done once for the same flags.

        Args:
          directory: of the run.
          begin: gives the trained parameters and model state, whole on every device.

        Returns:
          Results of the best step, named finetuned_*.

        Raises:
          Stopped: a signal stopped it before its end.
        """
        study = self.context.study
        if kept := kept_results(study, directory):
            return kept
        best = self(begin(), study.finetune.steps, directory / FOLDER)
        found = measured(self._evaluate, (best.params, best.model_state), self.context.splits)
        results = {"finetuned_steps": best.steps} | {f"finetuned_{name}": value for name, value in found.items()}
        files.write_json(directory / NAME, {"settings": plain(study.finetune), "results": results})
        remove(directory / FOLDER / files.CHECKPOINTS)
        return results

    @cached_property
    def _evaluate(self) -> Any:
        return self.context.evaluate(self.model)

    def _value(self, params: Params, model_state: ModelState) -> Mapping[str, float]:
        params, model_state = jax.tree.map(local, (params, model_state))
        return self._evaluate(params, model_state, self.context.splits.deciding, None)

    def _begin(self, begin: tuple[Params, ModelState]) -> tuple[TrainState, TrainStep]:
        context = self.context
        study, mesh = context.study, context.mesh
        schedule = optax.warmup_constant_schedule(0.0, study.finetune.learning_rate, 50)
        step = make_step(
            self.model.specific_loss,
            None,
            optax.adam(schedule, b2=0.98),
            None,
            uniform(),
            batch_size=self._batch_size,
            micro_batches=study.micro_batches,
            mesh=mesh if mesh.size > 1 else None,
            gather=self.model.gather,
        )

        def create(params: Params, model_state: ModelState) -> TrainState:
            # A copy, as the state is donated.
            return step.init(jax.random.key(context.seed), jax.tree.map(jnp.copy, params), {}, model_state)

        return placed(study, mesh, step, create, *begin)

    @property
    def _batch_size(self) -> int:
        parts = self.context.mesh.size * self.context.study.micro_batches
        rows = min(self.context.study.batch_size, len(self.context.splits.specific))
        return rows // parts * parts or parts

    def _source(self) -> Source:
        loader = Loader(
            self.context.splits.specific,
            self._batch_size,
            seed=self.context.seed + 2_000_003,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return open_source(self.context.study.residence, loader, loader, self.context.mesh)


class _Best:
    """The best parameters so far, in memory and on disk."""

    def __init__(self, begin: tuple[Params, ModelState], value: Any, kept: Checkpoints, context: Context):
        self._evaluate, self._kept, self._mesh = value, kept, context.mesh
        measure = context.task.measures[0]
        self._name, self._sign = measure.name, 1 if measure.lower_is_better else -1
        restored = kept.restore_latest({"params": begin[0], "model_state": begin[1], _VALUE: 0.0})
        if restored is None:
            self.found = Finetuned(*begin, 0, value(*begin)[self._name])
            self._save()
        else:
            steps, best = restored
            self.found = Finetuned(best["params"], best["model_state"], steps, float(best[_VALUE]))

    def compare(self, state: TrainState) -> dict[str, float]:
        """Keep the parameters if they are better; a step that is evaluated again changes nothing."""
        whole = sharding.whole(self._mesh, (state.params, state.model_state))
        values = self._evaluate(*whole)
        if self._sign * values[self._name] < self._sign * self.found.value:
            steps, (params, model_state) = int(jax.device_get(state.step)), jax.tree.map(jnp.copy, whole)
            self.found = Finetuned(params, model_state, steps, values[self._name])
            self._save()
        return named("valid", "", values)

    def _save(self) -> None:
        f = self.found
        # To the end: several processes cannot have two checkpoints of one step under way.
        self._kept.save(f.steps, {"params": f.params, "model_state": f.model_state, _VALUE: f.value}, wait=True)


def kept_results(study: Any, directory: Path) -> dict[str, Any]:
    """Return the results of fine-tuning that a run's directory has for the same flags; {} if there are none."""
    file = directory / NAME
    kept = files.read_json(file) if study.finetune.steps and file.exists() else {}
    return kept["results"] if kept.get("settings") == plain(study.finetune) else {}


def _start_over_if_other(folder: Path, settings: dict[str, Any]) -> None:
    """Empty the folder of a phase with other settings."""
    if (folder / CONFIG_NAME).exists() and files.recorded(folder) not in ({}, settings):
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder; all processes call this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: nobody reads {folder.name}")
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: {folder.name} is removed")
