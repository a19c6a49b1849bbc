"""Measures of a model on whole sets of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import Dataset, JoinedData, evaluation_batches
from bilevel.devices import sharding
from bilevel.step import SampledState
from bilevel.types import Array, Batch, LossFn, ModelState, Params

Evaluate: TypeAlias = Callable[[Params, ModelState, Dataset, int | None], Mapping[str, float]]
"""(θ, model state, rows, most rows) -> the measures by name."""


_MOST_ROWS = 256
_MOST_LOGITS = 1 << 28
"""Of the rows that are evaluated at once: 1 GiB."""
_MOST_POSITIONS = 2048
"""Of the same, on two CPU cores: with eight times as many, networks of 2 and 4 layers took 2.0 and 1.8 times as long."""


def trained(state: Any, mesh: Mesh) -> tuple[Params, ModelState]:
    """Return what is evaluated of a state, whole on every device: the moving averages where they are kept, else θ itself."""
    state = state.train if isinstance(state, SampledState) else state
    found = (state.params, state.model_state) if state.ema is None else state.ema
    return sharding.whole(mesh, found)


def measured(
    evaluate: Evaluate,
    model: tuple[Params, ModelState],
    sets: Mapping[str, Mapping[str, Dataset]],
    limit: int | None = None,
) -> dict[str, float]:
    """Measure a model on several sets of rows; returns `valid_loss`, `valid_loss/generic`, ….

    Args:
      evaluate: gives the measures.
      model: θ and the model state.
      sets: phase ("valid", "test") -> name -> rows. The first set of a phase has no name of its own in the result.
      limit: most rows of each set; None: all.
    """
    params, model_state = sharding.local(model)
    found: dict[str, float] = {}
    for phase, of_phase in sets.items():
        for number, (which, rows) in enumerate(of_phase.items()):
            end = f"/{which}" if number else ""
            values = evaluate(params, model_state, rows, limit)
            found |= {f"{phase}_{name}{end}": float(value) for name, value in values.items()}
    return found


def mean_evaluator(loss: LossFn, batch_size: int, *, per: str | None = None, **metrics: str) -> Evaluate:
    """Return what measures a model by the mean `loss`, and by means of metrics of the loss.

    Args:
      loss: in evaluation mode.
      batch_size: most rows evaluated at once.
      per: field of a batch, `[b]`, that says how much each row counts, such as its length; None: all alike.
      metrics: name of a measure -> name of the metric `[b]`.
    """

    def sums(params: Params, model_state: ModelState, batch: Batch) -> dict[str, tuple[Array, Array]]:
        losses, aux = loss(params, model_state, batch, jax.random.key(0))
        values = {"loss": losses} | {name: aux.metrics[metric] for name, metric in metrics.items()}
        count = batch["mask"] if per is None else batch[per] * batch["mask"]
        return {name: ((value * count).sum(), count.sum()) for name, value in values.items()}

    return evaluator(sums, batch_size)


def rows_at_once(positions: int, vocabulary: int) -> int:
    """Return how many rows of text to evaluate at once, outside of steps.

    Args:
      positions: bytes, tokens or pieces of a row.
      vocabulary: logits of a position.
    """
    most = _MOST_ROWS
    if jax.default_backend() == "cpu":
        most = min(most, _MOST_POSITIONS * max(2, os.cpu_count() or 1) // 2 // positions)
    return max(1, min(most, _MOST_LOGITS // (positions * vocabulary)))


def evaluator(sums: Callable[[Params, ModelState, Any], Mapping[str, tuple[Any, Any]]], batch_size: int) -> Evaluate:
    """Return what measures a model on a set of rows, by one compiled program.

    Of several sets joined it gives the mean, each with as many rows.

    Args:
      sums: (θ, model state, batch with `mask`, float32 `[b]`) -> name of a measure -> (its sum over the rows that are not
        masked, what that is divided by). Of vectors the mean of the quotients counts, without those of nothing.
      batch_size: most rows evaluated at once.
    """
    compiled = jax.jit(sums)

    def evaluate(params: Params, model_state: ModelState, rows: Dataset, limit: int | None) -> Mapping[str, float]:
        if isinstance(rows, JoinedData):
            share = None if limit is None else max(1, limit // len(rows.parts))
            parts = [evaluate(params, model_state, part, share) for part in rows.parts.values()]
            return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
        batches = evaluation_batches(rows, min(batch_size, len(rows)), limit)
        found = jax.device_get([compiled(params, model_state, batch) for batch in batches])
        totals = {name: np.sum([batch[name] for batch in found], axis=0) for name in found[0]}
        return {name: _quotient(*total) for name, total in totals.items()}

    return evaluate


def _quotient(total: Any, count: Any) -> float:
    if np.ndim(total) == 0:
        return float(total / count)
    return float(np.mean(total[count > 0] / count[count > 0]))
