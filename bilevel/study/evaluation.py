"""Measures of a model on the sets of a task, by name: `valid_loss`, `test_accuracy`, `valid_loss/generic`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import Dataset, JoinedData, evaluation_batches
from bilevel.devices import sharding
from bilevel.step import SampledState
from bilevel.study.context import local
from bilevel.study.task import Evaluate, Splits
from bilevel.types import ModelState, Params


def named(phase: str, which: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return measures under the names that results and metrics have; the first set of a phase has no name of its own."""
    return {f"{phase}_{name}" + (f"/{which}" if which else ""): float(value) for name, value in values.items()}


def trained(state: Any, mesh: Mesh) -> tuple[Params, ModelState]:
    """Return what is evaluated of a state, whole on every device: the moving averages where they are kept, else θ itself."""
    state = state.train if isinstance(state, SampledState) else state
    found = (state.params, state.model_state) if state.ema is None else state.ema
    return sharding.whole(mesh, found)


def measured(
    evaluate: Evaluate, model: tuple[Params, ModelState], splits: Splits, limit: int | None = None, test: bool = True
) -> dict[str, float]:
    """Measure a model on the valid sets and, with `test`, on the test sets."""
    params, model_state = jax.tree.map(local, model)
    found: dict[str, float] = {}
    phases = {"valid": splits.valid, "test": splits.test if test else {}}
    for phase, sets in phases.items():
        for number, (name, rows) in enumerate(sets.items()):
            found |= named(phase, name if number else "", evaluate(params, model_state, rows, limit))
    return found


def while_training(
    evaluate: Evaluate, splits: Splits, mesh: Mesh, limit: int | None, test: bool
) -> Callable[[Any], Mapping[str, float]]:
    """Return the measures for the rows of metrics; with `test` those on test too, which choose nothing."""
    return lambda state: measured(evaluate, trained(state, mesh), splits, limit, test)


def evaluator(sums: Callable[[Params, ModelState, Any], Mapping[str, tuple[Any, Any]]], batch_size: int) -> Evaluate:
    """Return the measures of a task, with one compiled program.

    Args:
      sums: (θ, model state, batch with `mask`, float32 `[b]`) -> name of a measure -> (its sum over the rows that are not
        masked, what that is divided by).
      batch_size: most rows evaluated at once.

    Returns:
      A function of (θ, model state, rows, most rows). Of several sets joined it is the mean, each with as many rows.
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
        return {name: float(total / count) for name, (total, count) in totals.items()}

    return evaluate
