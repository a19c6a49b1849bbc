"""All methods, seeds and specific sets of a comparison, under the same budget of steps and then of seconds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax

from bilevel.devices import sharding
from bilevel.study import budget, comparison, diverged, files, search, sets
from bilevel.study.config import Config
from bilevel.study.feeding import loaders
from bilevel.study.finished import finished
from bilevel.study.registry import chosen, with_first
from bilevel.study.run import Setting, directory_of, plan_of
from bilevel.study.set_tables import MARKDOWN, write_tables
from bilevel.study.task import Task
from bilevel.training import TrainingDiverged
from bilevel.types import UserError

Results = list[dict[str, Any]]


def compare(config: Config, task: Task) -> None:
    """Do all that the flags ask for, print the tables, and skip what is done.

    Raises:
      UserError: for flags or data that are not possible, and at the end for runs that diverged.
      Stopped: a signal stopped a run.
    """
    study = config.study
    study.check()
    named = [name.strip() for name in study.compare.split(",")]
    if study.same_seconds and not study.budget_seconds and not {"uniform", "all"} & {*named}:
        raise UserError("--same-seconds takes uniform's seconds: add uniform to --compare, or give --budget-seconds.")
    settings = [(name, opened(own, task)) for name, own in sets.named_sets(config)]
    methods = chosen(study.compare, settings[0][1].splits.classes)
    for _, setting in settings:
        check_methods(setting, with_first(methods))
        if study.same_seconds and not study.eval_only:
            budget.check(setting.config)
    alone = len(methods) * study.seeds * len(settings) == 1 and not study.eval_only
    rows: Results = []
    for name, setting in settings:
        rows += _one_set(name, setting, methods, alone)
        shown = rows + _earlier(settings, task, rows)
        if not study.eval_only and (study.specific_sets or study.same_seconds or len({r["method"] for r in shown}) > 1):
            text = write_tables(study.run_dir, shown, task.measures[0])
            if name == settings[-1][0] and jax.process_index() == 0:
                print(f"\n{text}\n\nTables: {study.run_dir / MARKDOWN}")
    diverged.refuse(rows)


def opened(config: Config, task: Task) -> Setting:
    """Open the data of one specific set.

    Raises:
      UserError: for data that are missing, broken or too small.
    """
    return Setting(config, task, task.open(config.task, config.study.run_dir), sharding.make_mesh())


def check_methods(setting: Setting, methods: Sequence[str]) -> None:
    """Build the plan, the step and the loaders of every run and trial, without training.

    Raises:
      UserError: for settings that a run would refuse, naming the method.
    """
    if setting.config.study.eval_only:
        return
    for method in methods:
        for config in (setting.config, *search.trial_configs(setting.config, method, search.most_specific(setting))):
            check_method(setting.of(config), method)


def check_method(setting: Setting, method: str) -> None:
    """Check one method's settings against the data, without training; see `check_methods`."""
    study = setting.config.study
    context, plan = plan_of(setting, method, study.seed)
    if not plan.samples:
        loaders(context, plan)
    if plan.picks and study.big_batch_size > len(setting.splits.train):
        files.say(
            f"warning: --big-batch-size {study.big_batch_size} is more than the {len(setting.splits.train)} training rows: "
            "batches are picked from all of them."
        )


def _one_set(name: str, setting: Setting, methods: Sequence[str], alone: bool) -> Results:
    study = setting.config.study
    configs, found = _configs(setting, methods, alone)
    found += all_runs(setting._replace(others=configs), configs, alone)
    if not study.eval_only:
        found += _others(setting, found, methods)
    _show(setting, found)
    rows = _labelled(name, "steps", found)
    if not study.same_seconds or study.eval_only:
        return rows
    return rows + _labelled(name, "seconds", _same_seconds(setting, configs, found, alone))


def _labelled(name: str, kind: str, rows: Results) -> Results:
    return [{"specific_set": name, "budget": kind, **row} for row in rows]


def _configs(setting: Setting, methods: Sequence[str], alone: bool) -> tuple[dict[str, Config], Results]:
    """The configuration of each method, and the rows of those of which every trial diverged."""
    configs, lost = {}, []
    for method in methods:
        try:
            configs[method] = search.searched(setting, method)
        except TrainingDiverged as error:
            if alone:
                raise
            files.say(f"{method} is left out: {error}")
            where = str(search.folder_of(setting.config, method))
            lost += [{"method": method, "seed": s, diverged.WHERE: where} for s in setting.config.study.seed_numbers]
    return configs, lost


def all_runs(setting: Setting, configs: dict[str, Config], alone: bool) -> Results:
    """Train all seeds of all methods, seed by seed, so that the seconds of one seed are measured side by side."""
    results = []
    for seed in setting.config.study.seed_numbers:
        for method, own in configs.items():
            if own.study.progress:
                files.say(f"{method}, seed {seed}")
            results.append(diverged.attempt(setting.of(own), method, seed, alone))
    return results


def _others(setting: Setting, found: Results, methods: Collection[str], plan: budget.Plan | None = None) -> Results:
    """The runs on the same data that other commands finished here, with the plan's steps if there is one."""

    def config_of(method: str) -> Config | None:
        own = search.searched_before(setting.config, method)
        return own if plan is None else budget.planned(own, method, plan)

    here = setting if plan is None else setting.of(setting.config.with_study(run_dir=budget.folder_of(setting.config)))
    return finished(here, config_of, {(row["method"], row["seed"]) for row in found}, methods)


def _earlier(settings: Sequence[tuple[str, Setting]], task: Task, rows: Results) -> Results:
    """What earlier commands found for other specific sets in the same run directory."""
    known = {name for name, _ in settings} | {row["specific_set"] for row in rows}
    found: Results = []
    for name, config in sets.earlier_sets(settings[0][1].config, known):
        try:
            found += _labelled(name, "steps", _others(opened(config, task), [], ()))
        except UserError as error:
            files.say(f"{config.study.run_dir} is left out of the tables: {error}")
    return found


def _same_seconds(setting: Setting, configs: dict[str, Config], found: Results, alone: bool) -> Results:
    """Train each method with as many steps as fit in the budget of seconds; uniform itself only if its own differs."""
    config = setting.config
    plan = files.of_first(lambda: budget.plan(config, found))
    kept = {method for method, steps in plan["steps"].items() if steps == config.study.steps}
    short = [method for method, steps in plan["steps"].items() if steps < 1]
    if short:
        files.say(f"No step fits in {plan['seconds']:.0f} seconds after what precedes training: {', '.join(short)}.")
    planned = {method: budget.planned(own, method, plan) for method, own in configs.items()}
    others = {method: planned[method] or own for method, own in configs.items()}
    asked = {method: own for method, own in planned.items() if own is not None}
    results = all_runs(setting._replace(others=others), asked, alone)
    results += _others(setting, results, list(configs), plan)
    reused = [row for row in found if row["method"] in kept]
    if reused + results:
        elsewhere = {(r["method"], r["seed"]): directory_of(config, r["method"], r["seed"]) for r in reused}
        here = setting.of(config.with_study(run_dir=budget.folder_of(config)))
        _show(here, reused + results, elsewhere)
    trained = {row["method"] for row in reused + results}
    none = dict.fromkeys(row["method"] for row in found if row["method"] not in trained)
    return reused + results + [{"method": method} for method in none]


def _show(setting: Setting, results: Results, elsewhere: dict[tuple[str, int], Any] | None = None) -> None:
    if jax.process_index() != 0:
        return
    if setting.config.study.eval_only:
        print(comparison.table(results, setting.task))
        return
    print(comparison.write(setting, results, elsewhere or {}))
    print(f"\nReport: {setting.config.study.run_dir / comparison.REPORT}")
