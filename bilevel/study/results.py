"""What runs left in their directories: results, and notes of those that diverged, which are not trained again."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.devices.processes import of_first, say
from bilevel.study import fitting
from bilevel.study.context import CONTENT_HASH, RESULT, Context, Differing, Setting, begun
from bilevel.study.run import Run, run
from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import read_json, recorded, write_json
from bilevel.training.settings import plain
from bilevel.types import UserError

NAME = "diverged.json"
WHERE = "diverged_in"
"""In the row of a run that diverged: the directory with the note."""


def attempt(context: Context, alone: bool = False) -> dict[str, Any]:
    """Return the summary of a run; of one that diverged, now or before, what is known without training it again.

    Where it is `alone`, without another run to go on with, a `TrainingDiverged` is raised.
    """
    if alone or not of_first(lambda: _noted(context)):
        try:
            return run(context)
        except TrainingDiverged as error:
            if alone:
                raise
            write_json(_where(context.directory) / NAME, {"message": str(error), "step": error.step})
    row = of_first(lambda: diverged_row(context))
    file = Path(row[WHERE]) / NAME
    say(f"{file.parent} diverged: {read_json(file)['message']} Delete {file} to train it again.")
    return row


def diverged_row(context: Context) -> dict[str, Any]:
    """Return the row of a run that diverged: the results before fine-tuning, if it was that which did."""
    done = context.directory / RESULT
    before = read_json(done) if done.exists() else {"method": context.method, "seed": context.seed}
    return before | {WHERE: str(_where(context.directory))}


def refuse(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise a UserError that names the runs that diverged, after the tables."""
    failed = list(dict.fromkeys(row[WHERE] for row in rows if WHERE in row))
    if failed:
        raise UserError(
            f"{len(failed)} of the runs diverged and are dashes in the tables ({', '.join(failed)}): lower the learning rate "
            f"in another --run-dir, or delete {NAME} there to train them again."
        )


def _noted(context: Context) -> bool:
    """Whether the directory of a run says that it diverged, or its fine-tuning with the same flags."""
    folder, asked = _where(context.directory), plain(context.study.finetune)
    if not (folder / NAME).exists():
        return False
    if folder != context.directory:
        tuned = recorded(folder)
        return bool(asked["steps"]) and all(tuned.get(name) == value for name, value in asked.items())
    Run(context).prepare()
    return True


def _where(directory: Path) -> Path:
    """The directory that a run trains in: its own, or, after its end, that of fine-tuning."""
    return directory / fitting.FOLDER if (directory / RESULT).exists() else directory


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
    file = next((file for name in (RESULT, NAME) if (file := directory / name).exists()), None)
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
    row = diverged_row(context)
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
