"""The same seconds for every method: the budget, and the steps that fit in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from bilevel.study import files
from bilevel.study.config import Config
from bilevel.training.run_dir import CONFIG_NAME
from bilevel.types import UserError

FOLDER = "same_seconds"
NAME = "plan.json"


class Plan(TypedDict):
    """Decided once, as the runs depend on it."""

    asked: float
    """--budget-seconds."""
    seconds: float
    steps: dict[str, int]


def folder_of(config: Config) -> Path:
    """Return where the runs of the same seconds lie."""
    return config.study.run_dir / FOLDER


def planned(config: Config, method: str, plan: Plan) -> Config | None:
    """Return the configuration of a method's runs in the budget; None if no step fits, or its own runs serve."""
    steps = plan["steps"].get(method, 0)
    if steps < 1 or steps == config.study.steps:
        return None
    return config.with_study(steps=steps, schedule_steps=0, run_dir=folder_of(config))


def check(config: Config) -> None:
    """Refuse another budget of seconds than that of the runs that are there, before anything is trained.

    Raises:
      UserError: if there is one.
    """
    folder, asked = folder_of(config), config.study.budget_seconds

    def other() -> dict[str, Any]:
        begun = any(folder.glob(f"*-seed*/{CONFIG_NAME}")) and (folder / NAME).exists()
        plan = files.read_json(folder / NAME) if begun else {}
        return plan if plan.get("asked", asked) != asked else {}

    if plan := files.of_first(other):
        flags = f"--budget-seconds {plan['asked']:g}" if plan["asked"] else "no --budget-seconds"
        raise UserError(
            f"{folder} holds runs with a budget of {plan['seconds']:.0f} seconds: give {flags} as before, or another --run-dir."
        )


def plan(config: Config, found: list[dict[str, Any]]) -> Plan:
    """Return the budget in seconds and each method's steps, and keep them on disk."""
    file, asked = folder_of(config) / NAME, config.study.budget_seconds
    ended = [row for row in found if "seconds" in row]
    before: Any = files.read_json(file) if file.exists() else {}
    same = before.get("asked") == asked
    methods = list(dict.fromkeys(row["method"] for row in ended))
    if same and {*before["steps"]} >= {*methods}:
        return before
    if not same and not asked and "uniform" not in methods:
        files.say("No run of uniform ended, so that its seconds are not known.")
        return {"asked": 0.0, "seconds": 0.0, "steps": {}}
    seconds = before["seconds"] if same else asked or _mean(ended, "uniform", "seconds")
    steps = before["steps"] if same else {}
    steps |= {method: _steps_within(seconds, ended, method, config) for method in methods if method not in steps}
    made: Plan = {"asked": asked, "seconds": seconds, "steps": steps}
    files.write_json(file, made)
    return made


def _steps_within(budget: float, found: list[dict[str, Any]], method: str, config: Config) -> int:
    if method == "uniform" and not config.study.budget_seconds:
        return config.study.steps
    before = _mean(found, method, "preparation_seconds")
    each = (_mean(found, method, "seconds") - before) / config.study.steps
    return max(0, int((budget - before) / each))


def _mean(rows: list[dict[str, Any]], method: str, name: str) -> float:
    return float(np.mean([row.get(name, 0.0) for row in rows if row["method"] == method]))
