"""Training with weighting parameters that are given for each step.

Such as a trajectory that another run went through.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.devices import sharding
from bilevel.files import load_tree, save_tree
from bilevel.step.train_step import TrainStep
from bilevel.training.feed import Data, Item
from bilevel.training.programs import Programs, Step, StepChoice
from bilevel.training.resident import Resident
from bilevel.types import Batch, Params, UserError

_ON_DEVICE = 64
"""Snapshots that a replay keeps on the devices; others are read again when they are due."""


class Replay:
    """`Data`, and the weighting parameters α of each step, which travel like a batch.

    They replace those in the state before the step, whatever it held; so a checkpoint holds no more than usual.
    The method should be one that leaves them as they are (`bilevel.frozen`).

    Args:
        data: the batches.
        weight_params: step (counted from 0) -> α on the devices, with the tree, the shapes and the types that the state has;
            a pure function of the step, so that a run can be continued. Called in a thread.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.1.
    """

    def __init__(self, data: Data, weight_params: Callable[[int], Params]):
        self._data = data
        self._weight_params = weight_params

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Return the step functions, which take α after the batches.

        Raises:
            UserError: more than one step is asked for, or `step` chooses functions but is no `TrainStep`.
        """
        self._data.programs(step, steps_per_call)
        if isinstance(step, TrainStep):
            return Programs(step.map(_with_weights))
        if not callable(step):
            raise UserError(
                f"Replay takes a TrainStep or a step function, not a {type(step).__name__}: give one of these."
            )
        return Programs(_with_weights(step))

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Load the batches of one step, and its α."""
        item = self._data.item(first, count, steps_per_call)
        return item._replace(arguments=(*item.arguments, self._weight_params(first)))


class Snapshots(NamedTuple):
    """Files of α, one every `every` steps from the initial α on; equal parameters give equal files."""

    folder: Path
    every: int

    def path(self, step: int) -> Path:
        """Return the file of α after `step` steps."""
        return self.folder / f"{step:08d}.safetensors"

    def save(self, state: Any, step: int) -> None:
        """Write the α of the state after `step` steps, if it is due; an `on_state` of `train`."""
        if step % self.every == 0 and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tree(self.path(step), state.weight_params)

    def replay(self, order: NDArray[np.int64]) -> Callable[[Data | Resident, Mesh], Replay]:
        """Return what makes a `Replay` of data, which uses the snapshot `order[t]` in step t.

        Raises:
            UserError: when it is called, if a snapshot is missing.
        """

        def source(data: Data | Resident, mesh: Mesh) -> Replay:
            assert isinstance(data, Data)
            missing = next((self.path(step) for step in np.unique(order) if not self.path(step).exists()), None)
            if missing is not None:
                raise UserError(
                    f"The run in {self.folder.parent} lacks the snapshot {missing.name} of its weights: give another "
                    "--run-dir, or remove that run, which is then trained again."
                )
            where = sharding.replicated(mesh) if mesh.size > 1 else None

            @functools.lru_cache(maxsize=_ON_DEVICE)
            def placed(step: int) -> Params:
                return jax.device_put(load_tree(self.path(step))[0], where)

            return Replay(data, lambda step: placed(int(order[step])))

        return source


def _with_weights(function: Step) -> Any:
    def step(state: Any, big_batch: Batch, specific_batch: Batch, weights: Params) -> tuple[Any, Mapping[str, Any]]:
        return function(dataclasses.replace(state, weight_params=weights), big_batch, specific_batch)

    return step
