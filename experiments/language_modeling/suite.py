"""All methods, seeds and specific sets of a comparison, under the same budget of steps and then of seconds."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError
from experiments.language_modeling import comparison, search, tables
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora, load_corpora
from experiments.language_modeling.run import run
from experiments.runs import read_json, run_name

SAME_SECONDS = "same_seconds"
PLAN = "plan.json"
Results = list[dict[str, Any]]


def run_suite(config: Config) -> None:
    """Does all that the flags ask for, prints the tables, and skips what is done.

    Raises:
      UserError: for flags that do not go together.
      Stopped: a signal stopped a run.
    """
    methods = config.methods()
    if config.same_seconds and not config.budget_seconds and "uniform" not in methods:
        raise UserError("--same-seconds takes uniform's seconds: add uniform to --compare, or give --budget-seconds.")
    rows: Results = []
    for name, own in named_sets(config):
        rows += _one_set(name, own, methods)
    if jax.process_index() == 0 and not config.eval_only and (config.specific_sets or config.same_seconds):
        print("\n" + tables.write_tables(config.run_dir, rows))
        print(f"\nTables: {config.run_dir / tables.MARKDOWN}")


def named_sets(config: Config) -> list[tuple[str, Config]]:
    """The specific sets, each with its name and its own configuration.

    Raises:
      UserError: if two have the same name.
    """
    if not config.specific_sets:
        return [(set_name(config.data.specific), config)]
    names = [set_name(given) for given in config.specific_sets]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f'--specific-sets has two sets named "{double}": rename a file or folder of them.')
    return [
        (
            name,
            dataclasses.replace(
                config,
                specific_sets=(),
                run_dir=config.run_dir / name,
                data=dataclasses.replace(config.data, specific=given),
            ),
        )
        for name, given in zip(names, config.specific_sets, strict=True)
    ]


def set_name(given: str) -> str:
    """The name of a specific set: that of its folder or file, without what follows the first dot."""
    last = given.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in last) or "specific"


def _one_set(name: str, config: Config, methods: Sequence[str]) -> Results:
    corpora = load_corpora(config)
    chosen = search.searched(config, list(methods), corpora)
    found = _all_runs(config, chosen, corpora)
    if jax.process_index() == 0:
        _show(config, found, corpora, {})
    rows = [{"specific_set": name, "budget": "steps", **row} for row in found]
    if not config.same_seconds or config.eval_only:
        return rows
    again = _same_seconds(config, chosen, found, corpora)
    return rows + [{"specific_set": name, "budget": "seconds", **row} for row in again]


def _all_runs(config: Config, chosen: dict[str, Config], corpora: Corpora) -> Results:
    """All seeds of all methods, seed by seed, so that the seconds of one seed were measured side by side."""
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        for method, own in chosen.items():
            if config.progress and jax.process_index() == 0:
                print(f"{method}, seed {seed}", file=sys.stderr)
            results.append(run(own, method, seed, corpora))
    return results


def _show(config: Config, results: Results, corpora: Corpora, elsewhere: dict[tuple[str, int], Path]) -> None:
    if config.eval_only:
        print(comparison.table(results))
        return
    print(comparison.compare(config, results, corpora, elsewhere))
    print(f"\nReport: {config.run_dir / 'report.html'}")


def _same_seconds(config: Config, chosen: dict[str, Config], found: Results, corpora: Corpora) -> Results:
    """Trains each method with as many steps as fit in the budget of seconds; uniform itself only if its own differs."""
    folder = config.run_dir / SAME_SECONDS
    plan = _plan(config, folder, found)
    kept = {method for method, steps in plan["steps"].items() if steps == config.steps}
    short = [method for method, steps in plan["steps"].items() if steps < 1]
    if short:
        print(f"No step fits in {plan['seconds']:.0f} seconds after what precedes training: {short}.", file=sys.stderr)
    again = {
        method: dataclasses.replace(own, steps=plan["steps"][method], schedule_steps=0, run_dir=folder)
        for method, own in chosen.items()
        if method not in kept and method not in short
    }
    results = _all_runs(config, again, corpora)
    reused = [row for row in found if row["method"] in kept]
    if jax.process_index() == 0 and reused + results:
        elsewhere = {(r["method"], r["seed"]): config.run_dir / run_name(r["method"], r["seed"]) for r in reused}
        _show(dataclasses.replace(config, run_dir=folder), reused + results, corpora, elsewhere)
    return reused + results


def _plan(config: Config, folder: Path, found: Results) -> dict[str, Any]:
    """The budget in seconds and each method's steps; decided once, as the runs depend on it."""
    file = folder / PLAN
    plan = read_json(file) if file.exists() else {}
    if plan.get("asked") == config.budget_seconds and set(plan["steps"]) >= {row["method"] for row in found}:
        return plan
    budget = config.budget_seconds or _mean(found, "uniform", "seconds")
    steps = plan.get("steps", {}) if plan.get("asked") == config.budget_seconds else {}
    for method in dict.fromkeys(row["method"] for row in found):
        if method not in steps:
            steps[method] = _steps_within(budget, found, method, config)
    plan = {"asked": config.budget_seconds, "seconds": budget, "steps": steps}
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(plan, indent=2) + "\n")
    return plan


def _steps_within(budget: float, found: Results, method: str, config: Config) -> int:
    if method == "uniform" and not config.budget_seconds:
        return config.steps
    before = _mean(found, method, "preparation_seconds")
    each = (_mean(found, method, "seconds") - before) / config.steps
    return max(0, int((budget - before) / each))


def _mean(rows: Results, method: str, name: str) -> float:
    return float(np.mean([row.get(name, 0.0) for row in rows if row["method"] == method]))
