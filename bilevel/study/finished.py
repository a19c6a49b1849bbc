"""Runs that other commands finished in the same directory; the tables show them too."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.devices.processes import say
from bilevel.study import diverged, files, fitting
from bilevel.study.config import Config
from bilevel.study.run import Setting, changeable, directory_of, identity
from bilevel.training.run_dir import flatten, read_json, recorded

Differing = dict[str, tuple[Any, Any]]
"""Dotted name of a setting -> (as recorded, as this command has it)."""


class Result(NamedTuple):
    """A run of a comparison."""

    directory: Path
    row: dict[str, Any]
    """Its summary; of one that diverged what is known, with `diverged_in`."""

    @property
    def key(self) -> tuple[str, int]:
        """Method and seed."""
        return self.row["method"], self.row["seed"]


def finished(
    setting: Setting, configs: Mapping[str, Config], known: Collection[Result], methods: Collection[str]
) -> list[Result]:
    """Return the results of the runs of a directory that may stand in one table.

    These have the same settings but for method, seed and the method's own, and the same data; and the seeds of one method have
    the same settings. Runs that differ in the data, or from other seeds of their method, are named on stderr.

    Args:
      setting: its `run_dir` holds the directories METHOD-seedN.
      configs: method -> what its runs are to have been made with, in the order of the table.
      known: runs to leave out.
      methods: of this command: the seeds of these must be like its runs, those of other methods like the method's latest run.
    """
    out, begun = {result.key for result in known}, files.begun(setting.config.study.run_dir)
    order = [(name, seed) for method in configs for name, seed in sorted(begun) if name == method]
    found = [run for key in order if key not in out and (run := _found(setting.of(configs[key[0]]), *key))]
    latest = {run.result.key[0]: run.own for run in sorted(found, key=lambda run: run.ended)}
    wanted = latest | {method: {} for method in methods}
    kept = []
    for result, own, _ in found:
        like = wanted[result.key[0]]
        if own == like:
            kept.append(result)
        else:
            leave_out(result.directory, f"its settings differ from those of other seeds ({_compared(own, like)})")
    return kept


class _Found(NamedTuple):
    result: Result
    own: Differing
    """Settings of the method."""
    ended: float


def _found(setting: Setting, method: str, seed: int) -> _Found | None:
    """A run that ended or diverged, if its data and what all methods share are as this command has them."""
    directory = directory_of(setting.config, method, seed)
    file = next((file for name in (files.RESULT, diverged.NAME) if (file := directory / name).exists()), None)
    if file is None:
        return None
    other = differing(setting, method, seed)
    own = {name.removeprefix(f"{method}."): x for name, x in other.items() if name.startswith(f"{method}.")}
    data = [name.removeprefix(f"{files.CONTENT_HASH}.") for name in other if name.startswith(files.CONTENT_HASH)]
    if len(other) > len(own) + len(data):
        return None
    if data:
        leave_out(directory, f"it was trained on other {', '.join(data)} data")
        return None
    row = diverged.known(directory, method, seed)
    if file.name == files.RESULT:
        row = read_json(file) | fitting.kept_results(setting.config.study, directory)
    return _Found(Result(directory, row), own, file.stat().st_mtime)


def _compared(own: Differing, like: Differing) -> str:
    """In which settings two runs differ, each given by what differs from this command."""
    given = {name: now for name, (_, now) in (own | like).items()}
    one, other = (given | {name: was for name, (was, _) in each.items()} for each in (own, like))
    return ", ".join(
        [f"{name} is {one[name]}, not {other[name]}" for name in sorted(given) if one[name] != other[name]][:3]
    )


def differing(setting: Setting, method: str, seed: int) -> Differing:
    """Return the settings that decide the outcome of a run and differ from those of this command.

    Digests of what each seed takes from another run do not count.
    """
    before = recorded(directory_of(setting.config, method, seed))
    old, new = flatten(before), flatten(identity(setting, method, seed, {}))
    names = {name for name in {*old, *new} - {*changeable(setting, method)} if not name.endswith("_digest")}
    return {name: (old.get(name), new.get(name)) for name in sorted(names) if old.get(name) != new.get(name)}


@functools.cache
def leave_out(folder: Path, why: str) -> None:
    """Say on stderr, once, however often a directory is looked through, that it is not in the tables."""
    say(f"{folder} is left out of the tables: {why}.")
