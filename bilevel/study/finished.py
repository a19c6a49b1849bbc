"""Runs that other commands finished in the same directory; the tables show them too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.study import diverged, files, fitting
from bilevel.study.config import Config
from bilevel.study.registry import METHODS
from bilevel.study.run import Setting, changeable, directory_of, identity
from bilevel.training.run_dir import CONFIG_NAME, flatten


class _Found(NamedTuple):
    folder: Path
    method: str
    own: dict[str, Any]
    """Settings of the method, as recorded."""
    wanted: dict[str, Any]
    """Those of this command."""
    data: dict[str, str]
    row: dict[str, Any]
    ended: float


def finished(
    setting: Setting,
    config_of: Callable[[str], Config | None],
    known: Collection[tuple[str, int]] = (),
    methods: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the results of the runs of a directory that may stand in one table.

    These have the same settings but for method, seed and the method's own, and the same data; and the seeds of one method have
    the same settings. Runs that differ in the data, or from other seeds of their method, are named on stderr.

    Args:
      setting: its `run_dir` holds the directories METHOD-seedN.
      config_of: method -> what its runs are to have been made with; None: they do not belong here.
      known: (method, seed) of runs to leave out.
      methods: of this command: the seeds of these must be like its runs, those of other methods like the method's latest run.
    """
    order = list(METHODS)
    folder, name = setting.config.study.run_dir, CONFIG_NAME
    found = (files.run_of(file.parent) for file in folder.glob(f"*-seed*/{name}"))
    runs = []
    for method, seed in sorted(
        (run for run in found if run and run[0] in METHODS), key=lambda r: (order.index(r[0]), r[1])
    ):
        config = None if (method, seed) in known else config_of(method)
        if config is not None and (one := _run(setting.of(config), method, seed)):
            runs.append(one)
    runs = _of_same_data(runs, setting.splits.hashes)
    return [run.row for run in _of_same_settings(runs, methods)]


def _run(setting: Setting, method: str, seed: int) -> _Found | None:
    """A run that ended or diverged, if what all methods share is as this command has it."""
    directory = directory_of(setting.config, method, seed)
    settings, wanted = files.recorded(directory), identity(setting, method, seed, {})
    if not settings or _shared(setting, method, settings) != _shared(setting, method, wanted):
        return None
    result, note = directory / files.RESULT, directory / diverged.NAME
    if result.exists():
        row = files.read_json(result) | fitting.kept_results(setting.config.study, directory)
    elif note.exists():
        result, row = note, {"method": method, "seed": seed}
    else:
        return None
    own = (_own(setting, method, settings), _own(setting, method, wanted))
    return _Found(directory, method, *own, settings.get(files.CONTENT_HASH, {}), row, result.stat().st_mtime)


def _shared(setting: Setting, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    apart = ("method", "seed", method, files.CONTENT_HASH)
    free = changeable(setting, method)
    found = flatten({name: value for name, value in settings.items() if name not in apart})
    return {name: value for name, value in found.items() if name not in free}


def _own(setting: Setting, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method, without what each seed takes from another run."""
    free = changeable(setting, method)
    found = settings.get(method, {})
    return {name: x for name, x in found.items() if f"{method}.{name}" not in free and not name.endswith("_digest")}


def _of_same_data(runs: list[_Found], hashes: Mapping[str, str]) -> list[_Found]:
    """Leave out, and name, the runs on other data."""
    kept = []
    for run in runs:
        other = sorted(name for name, value in run.data.items() if hashes.get(name, value) != value)
        if other:
            _say(f"{run.folder} is left out of the tables: it was trained on other {', '.join(other)} data.")
        else:
            kept.append(run)
    return kept


def _of_same_settings(runs: list[_Found], methods: Collection[str]) -> list[_Found]:
    """Leave out, and name, the seeds of a method with other settings than those of this command, or of its latest run."""
    latest = {run.method: run for run in sorted(runs, key=lambda run: run.ended)}
    kept = []
    for run in runs:
        like = run.wanted if run.method in methods else latest[run.method].own
        other = sorted(name for name in {**run.own, **like} if run.own.get(name) != like.get(name))
        if other:
            what = ", ".join(f"{name} is {run.own.get(name)}, not {like.get(name)}" for name in other[:3])
            _say(f"{run.folder} is left out of the tables: its settings differ from those of other seeds ({what}).")
        else:
            kept.append(run)
    return kept


@functools.cache
def _say(text: str) -> None:
    """Print a line on stderr, once, however often a directory is looked through."""
    files.say(text)
