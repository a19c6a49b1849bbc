"""Runs that other commands finished in the same directory; the tables show them too."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bilevel.training.run_dir import CONFIG_NAME, flatten
from experiments import diverged
from experiments.language_modeling import contrastive, finetune
from experiments.language_modeling.config import METHODS, Config
from experiments.language_modeling.run import MAY_CHANGE, settings_dict
from experiments.language_modeling.weights import DIGEST
from experiments.runs import CONTENT_HASH, RESULT_NAME, read_json

NOT_SHARED = ("method", "seed", "weights", CONTENT_HASH)
"""What may differ between methods, and the data, which have rules of their own."""
OF_A_SEED = (DIGEST, contrastive.SCORES_DIGEST, "contrastive_scores", "frozen_from")
"""Among the --weights settings of a method: what each seed takes from another run."""


class _Run(NamedTuple):
    folder: Path
    method: str
    settings: dict[str, Any]
    """As recorded."""
    wanted: dict[str, Any]
    """Those of a run of the same method and seed by this command."""
    row: dict[str, Any]
    ended: float

    @property
    def data(self) -> dict[str, str]:
        return self.settings.get(CONTENT_HASH, {})


def finished(
    folder: Path,
    config_of: Callable[[str], Config | None],
    known: Collection[tuple[str, int]] = (),
    hashes: Mapping[str, str] | None = None,
    methods: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The results of the runs of a directory that may stand in one table.

    These have the same settings but for method, seed and --weights flags, and the same data; and the seeds of one method have the
    same --weights flags. Runs that differ in the data, or from other seeds of their method, are named on stderr.

    Args:
      folder: with the directories METHOD-seedN.
      config_of: method -> what its runs are to have been made with; None: they do not belong here.
      known: (method, seed) of runs to leave out.
      hashes: of the data, as in `Corpora.content_hashes`; what it lacks is that of the latest run.
      methods: of this command: the seeds of these must be like its runs, those of other methods like the method's latest run.
    """
    runs = []
    for method, seed in sorted(_runs(folder), key=lambda run: (METHODS.index(run[0]), run[1])):
        config = None if (method, seed) in known else config_of(method)
        if config is not None and (run := _run(folder, config, method, seed)):
            runs.append(run)
    runs = _of_same_data(runs, hashes or {})
    return [run.row for run in _of_same_weights(runs, methods)]


def _runs(folder: Path) -> list[tuple[str, int]]:
    parts = [path.parent.name.rsplit("-seed", 1) for path in folder.glob(f"*-seed*/{CONFIG_NAME}")]
    return [(part[0], int(part[1])) for part in parts if part[0] in METHODS and part[1].isdecimal()]


def _run(folder: Path, config: Config, method: str, seed: int) -> _Run | None:
    """A run that ended or diverged, if what all methods share is as this command has it."""
    directory = folder / f"{method}-seed{seed}"
    wanted = json.loads(json.dumps(settings_dict(config, method, seed), default=str))
    settings = read_json(directory / CONFIG_NAME)
    if _shared(settings) != _shared(wanted):
        return None
    result, note = directory / RESULT_NAME, directory / diverged.NAME
    if result.exists():
        row = read_json(result) | finetune.kept_results(config, directory)
    elif note.exists():
        result, row = note, {"method": method, "seed": seed}
    else:
        return None
    return _Run(directory, method, settings, wanted, row, result.stat().st_mtime)


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    own = {name: value for name, value in settings.items() if name not in NOT_SHARED}
    return {name: value for name, value in flatten(own).items() if name not in MAY_CHANGE}


def _of_same_data(runs: list[_Run], hashes: Mapping[str, str]) -> list[_Run]:
    """Leaves out, and names, the runs on other data; those that recorded no hashes stay."""
    latest = max(runs, key=lambda run: run.ended).data if runs else {}
    now = {**latest, **hashes}
    kept = []
    for run in runs:
        other = sorted(name for name, value in run.data.items() if now.get(name, value) != value)
        if other:
            _say(f"{run.folder} is left out of the tables: it was trained on other {', '.join(other)} data.")
        else:
            kept.append(run)
    return kept


def _of_same_weights(runs: list[_Run], methods: Collection[str]) -> list[_Run]:
    """Leaves out, and names, the seeds of a method with other --weights settings than those of this command (for its `methods`),
    or of the method's latest run."""
    latest = {run.method: run for run in sorted(runs, key=lambda run: run.ended)}
    kept = []
    for run in runs:
        like = run.wanted if run.method in methods else latest[run.method].settings
        before, now = _weights(run.settings), _weights(like)
        other = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
        if other:
            what = ", ".join(f"{name} is {before.get(name)}, not {now.get(name)}" for name in other[:3])
            _say(f"{run.folder} is left out of the tables: its --weights differ from those of other seeds ({what}).")
        else:
            kept.append(run)
    return kept


def _weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings["weights"].items() if name not in OF_A_SEED}


@functools.cache
def _say(text: str) -> None:
    """Prints a line on stderr, once, however often a directory is looked through."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)
