"""Training with weighting parameters that are given for each step, such as a trajectory that another run went through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bilevel.training.feed import Data, Item
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.types import Batch, Params


class Replay:
    """`Data`, and the weighting parameters α of each step, which travel like a batch.

    They take the place of those in the state before the step, whatever it held; so a checkpoint holds no more than usual.
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
        """The step functions, which take α after the batches.

        Raises:
            UserError: more than one step is asked for.
        """
        self._data.programs(step, steps_per_call)
        return Programs(_Replayed(step))

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """The batches of one step, and its α."""
        item = self._data.item(first, count, steps_per_call)
        return item._replace(arguments=(*item.arguments, self._weight_params(first)))


class _Replayed:
    """Chooses as `step` does, among functions that take α."""

    def __init__(self, step: Any):
        self._step = step
        self._made: dict[Step, Program] = {}

    def at(self, step: int, /) -> Program:
        function = self._step.at(step) if hasattr(self._step, "at") else self._step
        if function not in self._made:
            self._made[function] = _with_weights(function)
        return self._made[function]


def _with_weights(function: Step) -> Program:
    def step(state: Any, big_batch: Batch, specific_batch: Batch, weights: Params) -> tuple[Any, Mapping[str, Any]]:
        return function(dataclasses.replace(state, weight_params=weights), big_batch, specific_batch)

    return step
