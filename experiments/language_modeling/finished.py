"""Runs that other commands finished in the same directory; the tables show them too."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bilevel.training.run_dir import CONFIG_NAME, flatten
from experiments import diverged
from experiments.language_modeling import finetune
from experiments.language_modeling.config import METHODS, Config
from experiments.language_modeling.run import MAY_CHANGE, settings_dict
from experiments.runs import CONTENT_HASH, RESULT_NAME, read_json

OF_ONE_RUN = ("method", "seed", "weights", CONTENT_HASH)
"""What may differ between the runs of a comparison, and what their commands compare themselves."""


def finished(
    folder: Path, config_of: Callable[[str], Config | None], known: Collection[tuple[str, int]] = ()
) -> list[dict[str, Any]]:
    """The results of the runs of a directory that have the same settings but for method, seed and --weights flags.

    Args:
      folder: with the directories METHOD-seedN.
      config_of: method -> what its runs are to have been made with; None: they do not belong here.
      known: (method, seed) of runs to leave out.
    """
    rows = []
    for method, seed in sorted(_runs(folder), key=lambda run: (METHODS.index(run[0]), run[1])):
        config = None if (method, seed) in known else config_of(method)
        if config is not None and (row := _row(folder / f"{method}-seed{seed}", config, method, seed)):
            rows.append(row)
    return rows


def _runs(folder: Path) -> list[tuple[str, int]]:
    parts = [path.parent.name.rsplit("-seed", 1) for path in folder.glob(f"*-seed*/{CONFIG_NAME}")]
    return [(part[0], int(part[1])) for part in parts if part[0] in METHODS and part[1].isdecimal()]


def _row(directory: Path, config: Config, method: str, seed: int) -> dict[str, Any] | None:
    wanted = json.loads(json.dumps(settings_dict(config, method, seed), default=str))
    if _shared(read_json(directory / CONFIG_NAME)) != _shared(wanted):
        return None
    if (directory / RESULT_NAME).exists():
        return read_json(directory / RESULT_NAME) | finetune.kept_results(config, directory)
    return {"method": method, "seed": seed} if (directory / diverged.NAME).exists() else None


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    own = {name: value for name, value in settings.items() if name not in OF_ONE_RUN}
    return {name: value for name, value in flatten(own).items() if name not in MAY_CHANGE}
