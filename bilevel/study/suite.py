"""All methods, seeds and specific sets of a comparison, under the same budget of steps and then of seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from bilevel.devices import sharding
from bilevel.devices.environment import compile_anew
from bilevel.devices.processes import of_first, say
from bilevel.study import budget, comparison, search, sets
from bilevel.study.config import Config
from bilevel.study.context import Context, Setting
from bilevel.study.feeding import loaders, small_of
from bilevel.study.registry import BASELINE, METHODS, chosen, with_first
from bilevel.study.results import WHERE, Result, attempt, finished, refuse
from bilevel.study.run import Run
from bilevel.study.set_tables import MARKDOWN, write_tables
from bilevel.study.task import Task
from bilevel.training import TrainingDiverged
from bilevel.training.metrics import Row
from bilevel.types import UserError


def compare(config: Config, task: Task) -> None:
    """Do all that the flags ask for, print the tables, and skip what is done.

    Raises:
      UserError: for flags or data that are not possible, and at the end for runs that diverged.
      Stopped: a signal stopped a run.
    """
    study = config.study
    study.check()
    named = [name.strip() for name in study.compare.split(",")]
    if study.same_seconds and not study.budget_seconds and not {BASELINE, "all"} & {*named}:
        raise UserError("--same-seconds takes uniform's seconds: add uniform to --compare, or give --budget-seconds.")
    settings = {name: opened(own, task) for name, own in sets.named_sets(config)}
    first = next(iter(settings.values()))
    methods = chosen(study.compare, first.splits)
    for setting in settings.values():
        check_methods(setting, with_first(methods))
    rows: list[Row] = []
    earlier = sets.earlier_sets(first, settings) if study.specific_sets and not study.eval_only else []
    text = ""
    for name, setting in settings.items():
        rows += one_set(name, setting, methods)
        several = study.specific_sets or study.same_seconds or len({row["method"] for row in rows}) > 1
        if several and not study.eval_only and jax.process_index() == 0:
            text = write_tables(study.run_dir, rows + earlier, task.measures[0])
    if text:
        print(f"\n{text}\n\nTables: {study.run_dir / MARKDOWN}")
    refuse(rows)


def opened(config: Config, task: Task) -> Setting:
    """Open the data of one specific set; a UserError says what is wrong with them."""
    mesh = sharding.make_mesh()
    compile_anew(mesh)
    return Setting(config, task, task.open(config.task, config.study.run_dir), mesh)


def check_methods(setting: Setting, methods: Sequence[str]) -> None:
    """Build the plan, the step and the loaders of every run and trial, without training.

    A UserError names the method whose settings a run would refuse.
    """
    if setting.config.study.eval_only:
        return
    for method in methods:
        check_run(setting.context(method, setting.config.study.seed))
        for trial in search.trials(setting, method):
            check_run(trial.context)


def check_run(context: Context) -> None:
    """Check a method's settings against the data, without training; see `check_methods`."""
    plan, size, rows = Run(context).plan, context.study.big_batch_size, len(context.splits.train)
    if context.study.two_stage:
        small_of(context.splits, context.splits.train)
    if not plan.samples:
        loaders(context, plan)
    if plan.picks and size > rows:
        say(
            f"warning: --big-batch-size {size} is more than the {rows} training rows: batches are picked from all of them."
        )


def one_set(name: str, setting: Setting, methods: Sequence[str]) -> list[Row]:
    """Compare methods on one specific set; returns a row a run, and one for a method without runs."""
    study = setting.config.study
    configs, lost = _searched(setting, methods)
    setting = dataclasses.replace(setting, others=configs)
    results = lost + _runs(setting, [method for method in methods if method in configs])
    _show(setting, results)
    rows = sets.labelled(name, "steps", [result.row for result in results])
    if not study.same_seconds or study.eval_only:
        return rows
    return rows + sets.labelled(name, "seconds", _same_seconds(setting, methods, results))


def _searched(setting: Setting, methods: Sequence[str]) -> tuple[dict[str, Config], list[Result]]:
    """The configuration of every method, and the runs that cannot be made, as all trials of their method diverged."""
    config, lost = setting.config, []
    configs = {method: search.searched_before(config, method) for method in METHODS}
    for method in methods:
        try:
            configs[method] = search.searched(setting, method)
        except TrainingDiverged as error:
            say(f"{method} is left out: {error}")
            where = search.folder_of(config, method)
            rows = [{"method": method, "seed": s, WHERE: str(where)} for s in config.study.seed_numbers]
            lost += [Result(setting.context(method, row["seed"]), row) for row in rows]
            del configs[method]
    return configs, lost


def _runs(setting: Setting, methods: Sequence[str]) -> list[Result]:
    """Train some methods, seed by seed, so that the seconds of one seed are measured side by side.

    Returns:
      Their runs, and those in the same directory that other commands finished.
    """
    results = []
    for seed in setting.config.study.seed_numbers:
        for method in methods:
            if setting.config.study.progress:
                say(f"{method}, seed {seed}")
            context = setting.own_context(method, seed)
            results.append(Result(context, attempt(context)))
    others = [] if setting.config.study.eval_only else finished(setting, results, methods)
    return results + others


def _same_seconds(setting: Setting, methods: Sequence[str], results: Sequence[Result]) -> list[Row]:
    """Train each method with as many steps as fit in the budget of seconds; uniform itself only if its own differs."""
    config, rows = setting.config, [result.row for result in results]
    plan = of_first(lambda: budget.plan(config, rows))
    short = [method for method, steps in plan["steps"].items() if steps < 1]
    if short:
        say(f"No step fits in {plan['seconds']:.0f} seconds after what precedes training: {', '.join(short)}.")
    planned = budget.planned(setting.others, plan)
    here = dataclasses.replace(setting.at(budget.folder_of(config)), others={**setting.others, **planned})
    found = [result for result in results if plan["steps"].get(result.row["method"]) == config.study.steps]
    found += _runs(here, [method for method in methods if method in planned])
    if found:
        _show(here, found)
    known = {result.row["method"] for result in found}
    without = dict.fromkeys(row["method"] for row in rows if row["method"] not in known)
    return [*(result.row for result in found), *({"method": method} for method in without)]


def _show(setting: Setting, results: Sequence[Result]) -> None:
    if jax.process_index() != 0:
        return
    if setting.config.study.eval_only:
        print(comparison.table([result.row for result in results], setting.task))
    else:
        print(comparison.write(setting, results))
        print(f"\nReport: {setting.config.study.run_dir / comparison.REPORT}")
