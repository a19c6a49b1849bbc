"""Loss and accuracy on data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from bilevel.data import Dataset, evaluation_batches
from bilevel.state import TrainState
from bilevel.step.sampled import SampledState
from bilevel.types import Array, LossFn, ModelState, Params
from experiments.image_classification.data import ImageData

EVALUATION_BATCH = 512


class Score(NamedTuple):
    """Means over a data set."""

    loss: float
    accuracy: float


class Evaluator:
    """Loss and accuracy of a classifier, with one compiled program.

    Args:
      loss: in evaluation mode, with `correct` in its metrics.
    """

    def __init__(self, loss: LossFn):
        def sums(params: Params, model_state: ModelState, batch: Any) -> tuple[Array, Array, Array]:
            losses, aux = loss(params, model_state, batch, jax.random.key(0))
            mask = batch["mask"]
            return (losses * mask).sum(), (aux.metrics["correct"] * mask).sum(), mask.sum()

        self._sums = jax.jit(sums)

    def __call__(self, params: Params, model_state: ModelState, dataset: Dataset, limit: int | None = None) -> Score:
        """The means over (at most `limit`) rows."""
        size = min(EVALUATION_BATCH, len(dataset))
        found = [self._sums(params, model_state, batch) for batch in evaluation_batches(dataset, size, limit)]
        loss, correct, count = np.sum(jax.device_get(found), axis=0)
        return Score(float(loss / count), float(correct / count))


State: TypeAlias = TrainState | SampledState


def evaluated(state: State) -> tuple[Params, ModelState]:
    """What is evaluated of a state: the moving averages where they are kept, else the parameters themselves."""
    state = state.train if isinstance(state, SampledState) else state
    return (state.params, state.model_state) if state.ema is None else state.ema


def scores(evaluator: Evaluator, state: State, data: ImageData, limit: int | None = None) -> dict[str, float]:
    """Loss and accuracy on dev and test."""
    found: dict[str, float] = {}
    for name, dataset in (("dev", data.dev), ("test", data.test)):
        score = evaluator(*evaluated(state), dataset, limit)
        found |= {f"{name}_loss": score.loss, f"{name}_accuracy": score.accuracy}
    return found


def while_training(evaluator: Evaluator, data: ImageData, limit: int | None) -> Callable[[State], Mapping[str, float]]:
    """The same, for the metrics."""
    return lambda state: scores(evaluator, state, data, limit)
