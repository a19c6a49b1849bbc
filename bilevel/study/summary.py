"""The numbers of a run that follow from its metrics."""

from __future__ import annotations

from typing import Any

from bilevel.selection.known import faults
from bilevel.study.context import Context
from bilevel.study.task import Measure
from bilevel.training import TrainResult
from bilevel.training.metrics import best_row, even_intervals, mean_of

CORRECT = "generic_correct"
"""Metric of losses that know whether a row is classified right: on rows picked, the share that is learned already."""


def summary(context: Context, result: TrainResult, loaded_rows: int) -> dict[str, Any]:
    """Return the numbers of a run that follow from its metrics.

    Shares of the rows that were trained on are means over all rows of metrics (`share/NAME`), and over the last fifth of them
    (`share_at_end/NAME`); the effective sample size is that of the last fifth. Epochs are what the steps load, in generic rows:
    online selection loads more rows than it trains on.
    """
    shares, steps = [f"share/{name}" for name in faults(context.splits.known)], context.study.steps
    rows = even_intervals(result.history, [*shares, CORRECT, "effective_sample_size"])
    tail = rows[-max(1, len(rows) // 5) :]
    found = {"effective_sample_size": mean_of(tail, "effective_sample_size")}
    for name in shares:
        found[name] = mean_of(rows, name)
        found[name.replace("share/", "share_at_end/")] = mean_of(tail, name)
    found["learned_share"] = mean_of(rows, CORRECT)
    return {
        "method": context.method, "seed": context.seed, "steps": steps,
        "epochs": steps * loaded_rows / len(context.splits.train), "seconds": result.seconds,
        **{name: value for name, value in found.items() if value is not None},
        **_best(result.history, context.task.measures[0]),
    }  # fmt: skip


def _best(history: list[dict[str, Any]], measure: Measure) -> dict[str, float]:
    """The best value on test, and that at the best value on valid; {} where test is not measured while training."""
    valid, test = f"valid_{measure.name}", f"test_{measure.name}"
    known = [row for row in history if test in row and valid in row]
    if not known:
        return {}
    best, top = (best_row(known, name, lower_is_better=measure.lower_is_better) for name in (valid, test))
    return {f"best_{test}": top[test], f"{test}_at_best_valid": best[test]}
