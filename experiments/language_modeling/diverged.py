"""Runs of language models that diverged, in training or in fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.training import TrainingDiverged
from experiments.diverged import NAME, WHERE, note, noted, settled, tell
from experiments.language_modeling import finetune
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.run import MAY_CHANGE, run, settings_dict
from experiments.language_modeling.variant import Variant
from experiments.runs import RESULT_NAME, of_first, read_json, run_name


def attempt(
    config: Config, method: str, seed: int, corpora: Corpora, alone: bool = False, variant: Variant | None = None
) -> dict[str, Any]:
    """The summary of a run; of one that diverged, now or in an earlier start, what is known without training it again.

    Args:
      config: the flags.
      method: its name.
      seed: of the run.
      corpora: the data.
      alone: whether there is no other run to go on with; then a run that diverges ends the command.
      variant: what is done in another way than the flags say.

    Raises:
      TrainingDiverged: with `alone`.
      Stopped: a signal stopped it before its end.
    """
    folder, own = config.run_dir / run_name(method, seed), (variant or Variant()).settings
    row = of_first(lambda: known(config, method, seed, own))
    if row is None or alone:
        try:
            return run(config, method, seed, corpora, variant)
        except TrainingDiverged as error:
            if alone:
                raise
            where = _where(folder)
            note(where, error, _settings(config, method, seed, where, own))
            row = of_first(lambda: known(config, method, seed, own))
    tell(folder, row)
    return row


def known(config: Config, method: str, seed: int, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of a run whose directory says that it diverged with these settings; a note of other settings is removed."""
    folder = config.run_dir / run_name(method, seed)
    done = folder / RESULT_NAME
    where = _where(folder)
    if not (where / NAME).exists() or (
        done.exists() and (not config.finetune_steps or finetune.kept_results(config, folder))
    ):
        return None
    if not noted(where, _settings(config, method, seed, where, own)):
        return None
    row = read_json(done) if done.exists() else {"method": method, "seed": seed}
    return row | {WHERE: str(where)}


def _where(folder: Path) -> Path:
    """The directory that a run trains in: its own, or, after its end, that of fine-tuning."""
    return folder / finetune.FOLDER if (folder / RESULT_NAME).exists() else folder


def _settings(config: Config, method: str, seed: int, where: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """What decides whether the run, or its fine-tuning, diverges; with the settings of its variant."""
    if where.name == finetune.FOLDER:
        return finetune.settings_of_results(config)
    found = settled(settings_dict(config, method, seed) | dict(own), MAY_CHANGE)
    if method == "contrastive":
        found["finetune_learning_rate"] = config.finetune_learning_rate
    return found
