"""Runs that diverged: a comparison notes them, goes on without them, and does not train them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bilevel.devices.processes import of_first, say
from bilevel.study import fitting
from bilevel.study.context import RESULT, Context
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
    row = of_first(lambda: known(context))
    file = Path(row[WHERE]) / NAME
    say(f"{file.parent} diverged: {read_json(file)['message']} Delete {file} to train it again.")
    return row


def known(context: Context) -> dict[str, Any]:
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
