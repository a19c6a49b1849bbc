"""What a run is judged by: measures on the sets of a task (`valid_loss`, `valid_loss/generic`), and numbers of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from bilevel.devices import sharding
from bilevel.step import SampledState
from bilevel.study.context import Context
from bilevel.study.files import mean
from bilevel.study.observing import faults
from bilevel.study.task import Evaluate, Measure, Splits
from bilevel.training import TrainResult
from bilevel.training.metrics import even_intervals
from bilevel.types import ModelState, Params

SIZE = "effective_sample_size"
CORRECT = "generic_correct"
"""Metric of losses that know whether a row is classified right: on rows picked, the share that is learned already."""


def trained(state: Any, mesh: Mesh) -> tuple[Params, ModelState]:
    """Return what is evaluated of a state, whole on every device: the moving averages where they are kept, else θ itself."""
    state = state.train if isinstance(state, SampledState) else state
    found = (state.params, state.model_state) if state.ema is None else state.ema
    return sharding.whole(mesh, found)


def measured(
    evaluate: Evaluate, model: tuple[Params, ModelState], splits: Splits, limit: int | None = None, test: bool = True
) -> dict[str, float]:
    """Measure a model on the valid sets and, with `test`, on the test sets."""
    params, model_state = sharding.local(model)
    found: dict[str, float] = {}
    for phase, sets in {"valid": splits.valid, "test": splits.test if test else {}}.items():
        for number, (which, rows) in enumerate(sets.items()):
            end = f"/{which}" if number else ""  # the first set of a phase has no name of its own
            values = evaluate(params, model_state, rows, limit)
            found |= {f"{phase}_{name}{end}": float(value) for name, value in values.items()}
    return found


def summary(context: Context, result: TrainResult, loaded_rows: int) -> dict[str, Any]:
    """Return the numbers of a run that follow from its metrics.

    Shares of the rows that were trained on are means over all rows of metrics (`share/NAME`), and over the last fifth of them
    (`share_at_end/NAME`); the effective sample size is that of the last fifth. Epochs are what the steps
    load, in generic rows: online selection loads more rows than it trains on.
    """
    shares, steps = [f"share/{name}" for name in faults(context.splits)], context.study.steps
    rows = even_intervals(result.history, [*shares, CORRECT, SIZE])
    tail = rows[-max(1, len(rows) // 5) :]
    found = {SIZE: mean(tail, SIZE)}
    for name in shares:
        found[name] = mean(rows, name)
        found[name.replace("share/", "share_at_end/")] = mean(tail, name)
    found["learned_share"] = mean(rows, CORRECT)
    return {
        "method": context.method, "seed": context.seed, "steps": steps,
        "epochs": steps * loaded_rows / len(context.splits.train), "seconds": result.seconds,
        **{name: value for name, value in found.items() if value is not None},
        **_best(result.history, context.task.measures[0]),
    }  # fmt: skip


def narrowed(history: Sequence[Mapping[str, Any]], batch_size: int, advice: str) -> str | None:
    """Return a sentence on a run that came to draw from fewer rows than a batch has; None for others.

    Args:
      history: rows of metrics, in order; those without an effective sample size are left out.
      batch_size: b.
      advice: what mends it.
    """
    rows = [row for row in history if row.get(SIZE) is not None]
    first = next((row for row in rows if row[SIZE] < batch_size), None)
    if first is None:
        return None
    return (
        f"by step {first['step']} the effective sample size of what rows are drawn from was {first[SIZE]:.1f}, below the "
        f"{batch_size} of a batch, and at the end it was {rows[-1][SIZE]:.1f}: {advice}."
    )


def _best(history: list[dict[str, Any]], measure: Measure) -> dict[str, float]:
    """The best value on test, and that at the best value on valid; {} where test is not measured while training."""
    valid, test = f"valid_{measure.name}", f"test_{measure.name}"
    known = [row for row in history if test in row and valid in row]
    if not known:
        return {}
    best = min(known, key=lambda row: measure.sign * row[valid])
    top = min(known, key=lambda row: measure.sign * row[test])
    return {f"best_{test}": top[test], f"{test}_at_best_valid": best[test]}
