"""Runs that other commands finished in the same directory; the tables show them too."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.devices.processes import say
from bilevel.study import diverged, fitting
from bilevel.study.context import CONTENT_HASH, RESULT, Context, Differing, Setting, begun
from bilevel.training.run_dir import read_json


class Result(NamedTuple):
    """A run of a comparison."""

    context: Context
    row: dict[str, Any]
    """Its summary; of one that diverged what is known, with `diverged_in`."""

    @property
    def key(self) -> tuple[str, int]:
        """Method and seed."""
        return self.row["method"], self.row["seed"]


def finished(setting: Setting, known: Collection[Result], methods: Collection[str]) -> list[Result]:
    """Return the results of the runs of a directory that may stand in one table.

    These have the same settings but for method, seed and the method's own, and the same data; and the seeds of one method have
    the same settings. Runs that differ in the data, or from other seeds of their method, are named on stderr.

    Args:
      setting: its `run_dir` holds the directories METHOD-seedN; its `others` say what the runs of each method are to have been
        made with, in the order of the table.
      known: runs to leave out.
      methods: of this command: the seeds of these must be like its runs, those of other methods like the method's latest run.
    """
    here, out, order = setting.config.study.run_dir, {result.key for result in known}, list(setting.others)
    keys = [key for key in begun(here) if key not in out and key[0] in order]
    contexts = [setting.own_context(*key) for key in sorted(keys, key=lambda key: (order.index(key[0]), key[1]))]
    found = [run for context in contexts if context.directory.parent == here and (run := _found(context))]
    latest = {run.result.key[0]: run.own for run in sorted(found, key=lambda run: run.ended)}
    wanted = latest | {method: {} for method in methods}
    kept = []
    for result, own, _ in found:
        like = wanted[result.key[0]]
        if own == like:
            kept.append(result)
        else:
            leave_out(
                result.context.directory, f"its settings differ from those of other seeds ({_compared(own, like)})"
            )
    return kept


class _Found(NamedTuple):
    result: Result
    own: Differing
    """Settings of the method."""
    ended: float


def _found(context: Context) -> _Found | None:
    """A run that ended or diverged, if its data and what all methods share are as this command has them."""
    directory, begin = context.directory, f"{context.method}."
    file = next((file for name in (RESULT, diverged.NAME) if (file := directory / name).exists()), None)
    if file is None:
        return None
    other = context.differing()
    own = {name.removeprefix(begin): x for name, x in other.items() if name.startswith(begin)}
    data = [name.removeprefix(f"{CONTENT_HASH}.") for name in other if name.startswith(CONTENT_HASH)]
    if len(other) > len(own) + len(data):
        return None
    if data:
        leave_out(directory, f"it was trained on other {', '.join(data)} data")
        return None
    row = diverged.known(context)
    if file.name == RESULT:
        row = read_json(file) | fitting.kept_results(context.study, directory)
    return _Found(Result(context, row), own, file.stat().st_mtime)


def _compared(own: Differing, like: Differing) -> str:
    """In which settings two runs differ, each given by what differs from this command."""
    given = {name: now for name, (_, now) in (own | like).items()}
    one, other = (given | {name: was for name, (was, _) in each.items()} for each in (own, like))
    return ", ".join(
        [f"{name} is {one[name]}, not {other[name]}" for name in sorted(given) if one[name] != other[name]][:3]
    )


@functools.cache
def leave_out(folder: Path, why: str) -> None:
    """Say on stderr, once, however often a directory is looked through, that it is not in the tables."""
    say(f"{folder} is left out of the tables: {why}.")
