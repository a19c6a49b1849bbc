"""Training with weighting parameters that are given for each step.

Such as a trajectory that another run went through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bilevel.step.train_step import TrainStep
from bilevel.training.feed import Data, Item
from bilevel.training.programs import Programs, Step, StepChoice
from bilevel.types import Batch, Params, UserError


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


def _with_weights(function: Step) -> Any:
    def step(state: Any, big_batch: Batch, specific_batch: Batch, weights: Params) -> tuple[Any, Mapping[str, Any]]:
        return function(dataclasses.replace(state, weight_params=weights), big_batch, specific_batch)

    return step
