"""The weighting network of the evaluation that is best on valid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bilevel.devices import sharding
from bilevel.devices.processes import remove_folder
from bilevel.files import load_metadata, save_tree
from bilevel.study.context import Context
from bilevel.study.weights import BEST
from bilevel.training.checkpoints import kept_steps

FOLDER = "weights_best"
"""In the directory of a run under way: the networks that were better than all before, each as STEP.safetensors."""


class BestWeights:
    """Keeps the weighting network whenever the deciding measure on valid is better than at all evaluations before.

    Each is a file of its own with its step. A run that continues from a checkpoint forgets what came after it, so that what is
    kept is that of a run never stopped: the files are those since the oldest checkpoint, and the best before it. Process 0
    alone decides and writes.
    """

    def __init__(self, context: Context):
        self._context, self._folder = context, context.directory / FOLDER
        if jax.process_index() == 0:
            if (named := context.directory / BEST).exists():  # the run was killed at its end
                self._folder.mkdir(exist_ok=True)
                named.replace(self._file(int(load_metadata(named)["step"])))
            self._forget(after=max(kept_steps(context.directory), default=0))

    def compare(self, state: Any, values: Mapping[str, float]) -> None:
        """Keep the network of a state with these measures if it is the best so far. All processes call this."""
        context, measure = self._context, self._context.task.measures[0]
        alpha = sharding.local(sharding.whole(context.mesh, state.weight_params))
        if jax.process_index() != 0:
            return
        step, value = int(jax.device_get(state.step)), values[f"valid_{measure.name}"]
        self._forget(after=step - 1)
        known = self._steps()
        if not math.isfinite(value) or (known and measure.sign * value >= measure.sign * self._value(known[-1])):
            return
        self._folder.mkdir(exist_ok=True)
        about = {"task": context.task.name, "step": str(step), f"valid_{measure.name}": repr(value)}
        save_tree(self._file(step), alpha, about)
        oldest = min(kept_steps(context.directory), default=0)
        for before in [other for other in known if other <= oldest][:-1]:
            self._file(before).unlink()

    def finish(self) -> None:
        """Give the best network its name, at the end of a run. All processes call this."""
        if jax.process_index() == 0:
            known = self._steps()
            for step in known[:-1]:  # first, as a run killed here begins with what is left
                self._file(step).unlink()
            for step in known[-1:]:
                self._file(step).replace(self._context.directory / BEST)
        remove_folder(self._folder)

    def _forget(self, after: int) -> None:
        """Remove the networks of steps that are trained again."""
        for step in self._steps():
            if step > after:
                self._file(step).unlink()

    def _value(self, step: int) -> float:
        return float(load_metadata(self._file(step))[f"valid_{self._context.task.measures[0].name}"])

    def _steps(self) -> list[int]:
        """The steps of the files, each better than those before."""
        return sorted(int(file.stem) for file in self._folder.glob("[0-9]*.safetensors"))

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"
