"""Runs that diverged: a comparison notes them, goes on without them, and does not train them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bilevel.study import files, fitting
from bilevel.study.config import plain
from bilevel.study.run import Setting, Variant, changeable, directory_of, identity, plan_of, run
from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import flatten
from bilevel.types import UserError

NAME = "diverged.json"
WHERE = "diverged_in"
"""In the row of a run that diverged: the directory with the note."""


def attempt(
    setting: Setting, method: str, seed: int, alone: bool = False, variant: Variant | None = None
) -> dict[str, Any]:
    """Return the summary of a run; of one that diverged, now or before, what is known without training it again.

    Args:
      setting: configuration, task and data.
      method: its name.
      seed: of the run.
      alone: whether there is no other run to go on with; then a run that diverges ends the command.
      variant: what is done in another way than the flags say.

    Raises:
      TrainingDiverged: with `alone`.
      Stopped: a signal stopped it before its end.
    """
    own = (variant or Variant()).settings
    row = files.of_first(lambda: _known(setting, method, seed, own))
    if row is None or alone:
        try:
            return run(setting, method, seed, variant)
        except TrainingDiverged as error:
            if alone:
                raise
            folder = _where(directory_of(setting.config, method, seed))
            about = {
                "message": str(error),
                "step": error.step,
                "settings": _settings(setting, method, seed, folder, own),
            }
            files.write_json(folder / NAME, about)
            row = files.of_first(lambda: _known(setting, method, seed, own))
    file = Path(row[WHERE]) / NAME
    files.say(f"{file.parent} diverged: {files.read_json(file)['message']} Delete {file} to train it again.")
    return row


def refuse(rows: Iterable[Mapping[str, Any]]) -> None:
    """End a comparison, after its tables, by naming the runs that diverged.

    Raises:
      UserError: if there are some.
    """
    failed = list(dict.fromkeys(row[WHERE] for row in rows if WHERE in row))
    if failed:
        raise UserError(
            f"{len(failed)} of the runs diverged and are dashes in the tables ({', '.join(failed)}): lower the learning rate "
            f"in another --run-dir, or delete {NAME} there to train them again."
        )


def _known(setting: Setting, method: str, seed: int, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of a run whose directory says that it diverged with these settings; a note of other settings is removed."""
    directory = directory_of(setting.config, method, seed)
    folder, done = _where(directory), directory / files.RESULT
    study = setting.config.study
    if not (folder / NAME).exists() or (
        done.exists() and (not study.finetune.steps or fitting.kept_results(study, directory))
    ):
        return None
    if files.read_json(folder / NAME)["settings"] != _settings(setting, method, seed, folder, own):
        (folder / NAME).unlink()
        return None
    row = files.read_json(done) if done.exists() else {"method": method, "seed": seed}
    return row | {WHERE: str(folder)}


def _where(directory: Path) -> Path:
    """The directory that a run trains in: its own, or, after its end, that of fine-tuning."""
    return directory / fitting.FOLDER if (directory / files.RESULT).exists() else directory


def _settings(setting: Setting, method: str, seed: int, folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """What decides whether the run, or its fine-tuning, diverges."""
    if folder.name == fitting.FOLDER:
        return plain(setting.config.study.finetune)
    _, plan = plan_of(setting, method, seed)
    found = flatten(identity(setting, method, seed, plan.identity) | dict(own))
    kept = {name: value for name, value in found.items() if name not in changeable(setting, method)}
    if plan.switch is not None:
        kept["finetune.learning_rate"] = setting.config.study.finetune.learning_rate
    return plain(kept)
