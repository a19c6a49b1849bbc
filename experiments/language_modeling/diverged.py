"""Runs that diverged: a comparison notes them, goes on without them, and does not train them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import flatten, write_atomically
from experiments.language_modeling import finetune
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.run import MAY_CHANGE, run, settings_dict
from experiments.runs import RESULT_NAME, of_first, read_json, run_name

NAME = "diverged.json"
WHERE = "diverged_in"
"""In the row of a run that diverged: the directory with the note."""


def attempt(config: Config, method: str, seed: int, corpora: Corpora, alone: bool = False) -> dict[str, Any]:
    """The summary of a run; of one that diverged, now or in an earlier start, what is known without training it again.

    Args:
      config: the flags.
      method: its name.
      seed: of the run.
      corpora: the data.
      alone: whether there is no other run to go on with; then a run that diverges ends the command.

    Raises:
      TrainingDiverged: with `alone`.
      Stopped: a signal stopped it before its end.
    """
    folder = config.run_dir / run_name(method, seed)
    row = of_first(lambda: known(config, method, seed))
    if row is None or alone:
        try:
            return run(config, method, seed, corpora)
        except TrainingDiverged as error:
            if alone:
                raise
            _note(config, method, seed, error)
            row = of_first(lambda: known(config, method, seed))
    if jax.process_index() == 0:
        file = Path(row[WHERE]) / NAME
        print(f"{folder} diverged: {read_json(file)['message']} Delete {file} to train it again.", file=sys.stderr)
    return row


def known(config: Config, method: str, seed: int) -> dict[str, Any] | None:
    """The row of a run whose directory says that it diverged with these settings; a note of other settings is removed."""
    folder = config.run_dir / run_name(method, seed)
    done = folder / RESULT_NAME
    where = folder / finetune.FOLDER if done.exists() else folder
    file = where / NAME
    if not file.exists() or (done.exists() and (not config.finetune_steps or finetune.kept_results(config, folder))):
        return None
    if read_json(file)["settings"] != _settings(config, method, seed, where):
        file.unlink()
        return None
    row = read_json(done) if done.exists() else {"method": method, "seed": seed}
    return row | {WHERE: str(where)}


def _settings(config: Config, method: str, seed: int, where: Path) -> dict[str, Any]:
    """What decides whether the run, or its fine-tuning, diverges."""
    if where.name == finetune.FOLDER:
        return finetune.settings_of_results(config)
    found = flatten(json.loads(json.dumps(settings_dict(config, method, seed), default=str)))
    if method == "contrastive":
        found["finetune_learning_rate"] = config.finetune_learning_rate
    return {name: value for name, value in found.items() if name not in MAY_CHANGE}


def _note(config: Config, method: str, seed: int, error: TrainingDiverged) -> None:
    if jax.process_index() != 0:
        return
    folder = config.run_dir / run_name(method, seed)
    where = folder / finetune.FOLDER if (folder / RESULT_NAME).exists() else folder
    note = {"message": str(error), "step": error.step, "settings": _settings(config, method, seed, where)}
    write_atomically(where / NAME, json.dumps(note, indent=2) + "\n")
