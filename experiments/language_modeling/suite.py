"""All methods, seeds and specific sets of a comparison, under the same budget of steps and then of seconds."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import CONFIG_NAME, write_atomically
from bilevel.types import UserError
from experiments.diverged import WHERE, refuse
from experiments.language_modeling import checks, comparison, diverged, search, tables
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.finished import finished
from experiments.runs import of_first, read_json, run_name

SAME_SECONDS = "same_seconds"
PLAN = "plan.json"
Results = list[dict[str, Any]]


def run_suite(config: Config) -> None:
    """Does all that the flags ask for, prints the tables, and skips what is done.

    Raises:
      UserError: for flags that do not go together, and at the end for runs that diverged.
      Stopped: a signal stopped a run.
    """
    methods = config.methods()
    if config.same_seconds and not config.budget_seconds and "uniform" not in methods:
        raise UserError("--same-seconds takes uniform's seconds: add uniform to --compare, or give --budget-seconds.")
    if config.same_seconds and config.schedule_steps > config.steps:
        raise UserError(
            f"--same-seconds ends the learning rate with each run, and --schedule-steps {config.schedule_steps} after --steps "
            f"{config.steps}: leave one of the two away."
        )
    sets = named_sets(config)
    opened = _opened(sets, methods)
    for _, own in sets if config.same_seconds and not config.eval_only else ():
        _check_budget(own)
    hashes = {name: corpora.content_hashes for name, corpora in opened.items()}
    generic = {"generic": next(iter(hashes.values()))["generic"]}
    shown = [*sets, *earlier_sets(config, opened)]
    known = {
        name: []
        if config.eval_only
        else _on_disk(name, own, hashes.get(name, generic), methods if name in hashes else ())
        for name, own in shown
    }
    alone = len(methods) * config.seeds * len(sets) == 1
    text = None
    rows: Results = []
    for name, own in sets:
        known[name] = _one_set(name, own, methods, opened.pop(name), alone)
        rows = [row for found in known.values() for row in found]
        if jax.process_index() == 0 and not config.eval_only and _worth_tables(config, rows):
            text = tables.write_tables(config.run_dir, rows)
    if text is not None:
        print(f"\n{text}\n\nTables: {config.run_dir / tables.MARKDOWN}")
    refuse(rows)


def _opened(sets: Sequence[tuple[str, Config]], methods: list[str]) -> dict[str, Corpora]:
    """The data of all sets, checked with all methods; the generic data are held once."""
    opened: dict[str, Corpora] = {}
    for name, own in sets:
        corpora = checks.opened(own, methods)
        first = next(iter(opened.values()), corpora)
        if corpora.generic.content_hash == first.generic.content_hash:
            corpora = dataclasses.replace(first, specific=corpora.specific, task_weights=corpora.task_weights)
        opened[name] = corpora
    return opened


def _worth_tables(config: Config, rows: Results) -> bool:
    return bool(config.specific_sets) or config.same_seconds or len({row["method"] for row in rows}) > 1


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
    return [(name, _for_set(config, name, given)) for name, given in zip(names, config.specific_sets, strict=True)]


def _for_set(config: Config, name: str, given: str) -> Config:
    data = dataclasses.replace(config.data, specific=given)
    return dataclasses.replace(config, specific_sets=(), run_dir=config.run_dir / name, data=data)


def earlier_sets(config: Config, names: Collection[str]) -> list[tuple[str, Config]]:
    """The sets, besides those with these names, that earlier commands compared in the run directory of several sets."""
    found: dict[str, Config] = {}
    files = config.run_dir.glob(f"*/*-seed*/{CONFIG_NAME}") if config.specific_sets else ()
    for file in sorted(files):
        name, given = file.parent.parent.name, read_json(file).get("data", {}).get("specific", "")
        if name not in names and name not in found and set_name(given) == name:
            found[name] = _for_set(config, name, given)
    return list(found.items())


def set_name(given: str) -> str:
    """The name of a specific set: that of its folder or file, without what follows the first dot."""
    last = given.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in last) or "specific"


def _one_set(name: str, config: Config, methods: Sequence[str], corpora: Corpora, alone: bool) -> Results:
    chosen, found = _chosen(config, methods, corpora, alone)
    found += _all_runs(config, chosen, corpora, alone)
    if not config.eval_only:
        found += _others(config, found, corpora.content_hashes, methods)
    if jax.process_index() == 0:
        _show(config, found, corpora, {})
    rows = _labelled(name, "steps", found)
    if not config.same_seconds or config.eval_only:
        return rows
    return rows + _labelled(name, "seconds", _same_seconds(config, chosen, found, corpora, alone))


def _labelled(name: str, budget: str, rows: Results) -> Results:
    return [{"specific_set": name, "budget": budget, **row} for row in rows]


def _chosen(config: Config, methods: Sequence[str], corpora: Corpora, alone: bool) -> tuple[dict[str, Config], Results]:
    """The configuration of each method, and the rows of those of which every trial diverged."""
    chosen, lost = {}, []
    for method in methods:
        try:
            chosen[method] = search.searched(config, method, corpora)
        except TrainingDiverged as error:
            if alone:
                raise
            if jax.process_index() == 0:
                print(f"{method} is left out: {error}", file=sys.stderr)
            where = str(search.folder_of(config, method))
            lost += [{"method": method, "seed": seed, WHERE: where} for seed in _seeds(config)]
    return chosen, lost


def _seeds(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def _all_runs(config: Config, chosen: dict[str, Config], corpora: Corpora, alone: bool) -> Results:
    """All seeds of all methods, seed by seed, so that the seconds of one seed were measured side by side."""
    results = []
    for seed in _seeds(config):
        for method, own in chosen.items():
            if config.progress and jax.process_index() == 0:
                print(f"{method}, seed {seed}", file=sys.stderr)
            results.append(diverged.attempt(own, method, seed, corpora, alone))
    return results


def _others(
    config: Config,
    found: Results,
    hashes: Mapping[str, str],
    methods: Collection[str],
    plan: dict[str, Any] | None = None,
) -> Results:
    """The runs on the same data that other commands finished here, or in the folder of the runs with the plan's steps."""
    folder = config.run_dir if plan is None else config.run_dir / SAME_SECONDS

    def config_of(method: str) -> Config | None:
        own = search.searched_before(config, method)
        if plan is None:
            return own
        steps = plan["steps"].get(method, config.steps)
        return None if steps in (0, config.steps) else dataclasses.replace(own, steps=steps, schedule_steps=0)

    return finished(folder, config_of, {(row["method"], row["seed"]) for row in found}, hashes, methods)


def _on_disk(name: str, config: Config, hashes: Mapping[str, str], methods: Collection[str]) -> Results:
    """What earlier commands found for a set, of the methods of this command only what its own runs may stand beside."""
    steps, file = _others(config, [], hashes, methods), config.run_dir / SAME_SECONDS / PLAN
    if not config.same_seconds or not file.exists():
        return _labelled(name, "steps", steps)
    plan = read_json(file)
    kept = [row for row in steps if plan["steps"].get(row["method"]) == config.steps]
    return _labelled(name, "steps", steps) + _labelled(
        name, "seconds", kept + _others(config, [], hashes, methods, plan)
    )


def _show(config: Config, results: Results, corpora: Corpora, elsewhere: dict[tuple[str, int], Path]) -> None:
    if config.eval_only:
        print(comparison.table(results))
        return
    print(comparison.compare(config, results, corpora, elsewhere))
    print(f"\nReport: {config.run_dir / 'report.html'}")


def _same_seconds(config: Config, chosen: dict[str, Config], found: Results, corpora: Corpora, alone: bool) -> Results:
    """Trains each method with as many steps as fit in the budget of seconds; uniform itself only if its own differs."""
    folder, first = config.run_dir / SAME_SECONDS, jax.process_index() == 0
    plan = of_first(lambda: _plan(config, folder, found))
    kept = {method for method, steps in plan["steps"].items() if steps == config.steps}
    short = [method for method, steps in plan["steps"].items() if steps < 1]
    if short and first:
        names = ", ".join(short)
        print(f"No step fits in {plan['seconds']:.0f} seconds after what precedes training: {names}.", file=sys.stderr)
    again = {
        method: dataclasses.replace(own, steps=plan["steps"][method], schedule_steps=0, run_dir=folder)
        for method, own in chosen.items()
        if method in plan["steps"] and method not in kept and method not in short
    }
    results = _all_runs(config, again, corpora, alone)
    results += _others(config, results, corpora.content_hashes, list(chosen), plan)
    reused = [row for row in found if row["method"] in kept]
    if first and reused + results:
        elsewhere = {(r["method"], r["seed"]): config.run_dir / run_name(r["method"], r["seed"]) for r in reused}
        _show(dataclasses.replace(config, run_dir=folder), reused + results, corpora, elsewhere)
    trained = {row["method"] for row in reused + results}
    none = dict.fromkeys(row["method"] for row in found if row["method"] not in trained)
    return reused + results + [{"method": method} for method in none]


def _check_budget(config: Config) -> None:
    """Refuses another budget of seconds than that of the runs that are there, before anything is trained."""
    folder = config.run_dir / SAME_SECONDS

    def other() -> dict[str, Any]:
        plan = read_json(folder / PLAN) if any(folder.glob(f"*-seed*/{CONFIG_NAME}")) else {}
        return plan if plan.get("asked", config.budget_seconds) != config.budget_seconds else {}

    if plan := of_first(other):
        flags = f"--budget-seconds {plan['asked']:g}" if plan["asked"] else "no --budget-seconds"
        raise UserError(
            f"{folder} holds runs with a budget of {plan['seconds']:.0f} seconds: give {flags} as before, or another --run-dir."
        )


def _plan(config: Config, folder: Path, found: Results) -> dict[str, Any]:
    """The budget in seconds and each method's steps; decided once, as the runs depend on it."""
    file = folder / PLAN
    ended = [row for row in found if "seconds" in row]
    plan = read_json(file) if file.exists() else {}
    if plan.get("asked") == config.budget_seconds and set(plan["steps"]) >= {row["method"] for row in ended}:
        return plan
    same = plan.get("asked") == config.budget_seconds
    if not same and not config.budget_seconds and all(row["method"] != "uniform" for row in ended):
        print("No run of uniform ended, so that its seconds are not known.", file=sys.stderr)
        return {"asked": 0.0, "seconds": 0.0, "steps": {}}
    budget = plan["seconds"] if same else config.budget_seconds or _mean(ended, "uniform", "seconds")
    steps = plan["steps"] if same else {}
    for method in dict.fromkeys(row["method"] for row in ended):
        if method not in steps:
            steps[method] = _steps_within(budget, ended, method, config)
    plan = {"asked": config.budget_seconds, "seconds": budget, "steps": steps}
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
