"""The same seconds for every method: the budget, and the steps that fit in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from bilevel.devices.processes import say
from bilevel.study.config import Config
from bilevel.study.registry import BASELINE
from bilevel.training.metrics import mean_of
from bilevel.training.run_dir import read_json, write_json

NAME = "plan.json"


class Plan(TypedDict):
    """Decided once, as the runs depend on it."""

    seconds: float
    """0: not known, as no run of uniform ended."""
    steps: dict[str, int]
    """By method; 0: not one step fits."""


def folder_of(config: Config) -> Path:
    """Return where the runs of the same seconds lie: each budget has its own folder."""
    asked = config.study.budget_seconds
    return config.study.run_dir / (f"{asked:g}_seconds" if asked else "same_seconds")


def plan(config: Config, rows: Sequence[Mapping[str, Any]]) -> Plan:
    """Return the budget in seconds and each method's steps, given runs under the same budget of steps, and keep them on disk."""
    study, file = config.study, folder_of(config) / NAME
    found: Plan = read_json(file) if file.exists() else {"seconds": study.budget_seconds, "steps": {}}
    of_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:  # it did not diverge
            of_method.setdefault(row["method"], []).append(row)
    seconds = found["seconds"] or mean_of(of_method.get(BASELINE, []), "seconds")
    if seconds is None:
        say("No run of uniform ended, so that its seconds are not known.")
        return found
    steps = dict(found["steps"])
    for method, own in of_method.items():
        before = mean_of(own, "preparation_seconds") or 0.0
        each = ((mean_of(own, "seconds") or 0.0) - before) / study.steps
        own_seconds = method == BASELINE and not study.budget_seconds
        steps.setdefault(method, study.steps if own_seconds else max(0, int((seconds - before) / each)))
    found = {"seconds": seconds, "steps": steps}
    write_json(file, found)
    return found


def planned(configs: Mapping[str, Config], plan: Plan) -> dict[str, Config]:
    """Return the configurations of the runs in the budget; without methods of which no step fits, or whose own runs serve."""
    found = {}
    for method, config in configs.items():
        steps = plan["steps"].get(method, 0)
        if steps >= 1 and steps != config.study.steps:
            found[method] = config.with_study(steps=steps, schedule_steps=0, run_dir=folder_of(config))
    return found
