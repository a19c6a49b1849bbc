"""What a run says at its end."""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel.study.config import Study
from bilevel.study.evaluation import named
from bilevel.study.files import mean
from bilevel.study.observing import faults
from bilevel.study.task import Splits, Task
from bilevel.training import TrainResult
from bilevel.training.metrics import even_intervals

CORRECT = "generic_correct"
"""Metric of losses that know whether a row is classified right: on rows picked, the share that is learned already."""


def summary(
    method: str, seed: int, study: Study, result: TrainResult, splits: Splits, task: Task, epochs: float
) -> dict[str, Any]:
    """Return the numbers of a run that follow from its metrics.

    Shares of the rows that were trained on are means over all rows of metrics (`share/NAME`), and over the last fifth of them
    (`share_at_end/NAME`); the effective sample size is that of the last fifth.
    """
    names = [f"share/{name}" for name in faults(splits)]
    rows = even_intervals(result.history, [*names, CORRECT, "effective_sample_size"])
    tail = rows[-max(1, len(rows) // 5) :]
    found: dict[str, Any] = {
        "method": method, "seed": seed, "steps": study.steps, "epochs": epochs, "seconds": result.seconds,
    }  # fmt: skip
    sizes = [row["effective_sample_size"] for row in tail if "effective_sample_size" in row]
    found["effective_sample_size"] = float(np.mean(sizes)) if sizes else None
    for name in names:
        found[name] = mean(rows, name)
        found[name.replace("share/", "share_at_end/")] = mean(tail, name)
    found["learned_share"] = mean(rows, CORRECT)
    return {name: value for name, value in found.items() if value is not None} | _best(result.history, task)


def _best(history: list[dict[str, Any]], task: Task) -> dict[str, float]:
    """The best value on test, and that at the best value on valid; {} where test is not measured while training."""
    measure = task.measures[0]
    sign = 1 if measure.lower_is_better else -1
    (valid,), (test,) = named("valid", "", {measure.name: 0.0}), named("test", "", {measure.name: 0.0})
    known = [row for row in history if test in row and valid in row]
    if not known:
        return {}
    best = min(known, key=lambda row: sign * row[valid])
    return {f"best_{test}": sign * min(sign * row[test] for row in known), f"{test}_at_best_valid": best[test]}
