"""The weighting network of the evaluation that is best on valid, in the directory of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bilevel.devices import sharding
from bilevel.devices.processes import remove_folder
from bilevel.files import load_metadata, save_tree
from bilevel.training.checkpoints import kept_steps

BEST = "weights_best.safetensors"
"""In the directory of a run that has ended: the best network; its step is in the metadata."""
FOLDER = "weights_best"
"""In the directory of a run under way: the networks that were better than all before, each as STEP.safetensors."""


class BestWeights:
    """Keeps the weighting network whenever a value is better than at all evaluations before.

    Each is a file of its own with its step. A run that continues from a checkpoint forgets what came after it, so that what is
    kept is that of a run never stopped: the files are those since the oldest checkpoint, and the best before it. Process 0
    alone decides and writes.

    Args:
        directory: of the run.
        mesh: the devices of the state.
        name: of the value that decides, among those of an evaluation.
        sign: 1 if a lower value is better, else -1.
        about: texts for the header of the files, beside the step and the value.
    """

    def __init__(self, directory: Path, mesh: Mesh, name: str, sign: int, about: Mapping[str, str]):
        self._directory, self._folder, self._mesh = directory, directory / FOLDER, mesh
        self._name, self._sign, self._about = name, sign, about
        if jax.process_index() == 0:
            if (named := directory / BEST).exists():  # the run was killed at its end
                self._folder.mkdir(exist_ok=True)
                named.replace(self._file(int(load_metadata(named)["step"])))
            self._forget(after=max(kept_steps(directory), default=0))

    def compare(self, state: Any, values: Mapping[str, float]) -> None:
        """Keep the network of a state with these values if it is the best so far. All processes call this."""
        alpha = sharding.local(sharding.whole(self._mesh, state.weight_params))
        if jax.process_index() != 0:
            return
        step, value = int(jax.device_get(state.step)), values[self._name]
        self._forget(after=step - 1)
        known = self._steps()
        if not math.isfinite(value) or (known and self._sign * value >= self._sign * self._value(known[-1])):
            return
        self._folder.mkdir(exist_ok=True)
        save_tree(self._file(step), alpha, {**self._about, "step": str(step), self._name: repr(value)})
        oldest = min(kept_steps(self._directory), default=0)
        for before in [other for other in known if other <= oldest][:-1]:
            self._file(before).unlink()

    def finish(self) -> None:
        """Give the best network its name, at the end of a run. All processes call this."""
        if jax.process_index() == 0:
            known = self._steps()
            for step in known[:-1]:  # first, as a run killed here begins with what is left
                self._file(step).unlink()
            for step in known[-1:]:
                self._file(step).replace(self._directory / BEST)
        remove_folder(self._folder)

    def _forget(self, after: int) -> None:
        """Remove the networks of steps that are trained again."""
        for step in self._steps():
            if step > after:
                self._file(step).unlink()

    def _value(self, step: int) -> float:
        return float(load_metadata(self._file(step))[self._name])

    def _steps(self) -> list[int]:
        """The steps of the files, each better than those before."""
        return sorted(int(file.stem) for file in self._folder.glob("[0-9]*.safetensors"))

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"
