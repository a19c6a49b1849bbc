"""Search over the settings of each method, judged on valid: as many random trials for one as for another.

Without trials, the one setting of a method that its specification says is chosen on valid.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.devices.processes import of_first, say
from bilevel.study.config import Config
from bilevel.study.context import Context, Setting, begun
from bilevel.study.registry import METHODS
from bilevel.study.results import attempt
from bilevel.training import TrainingDiverged
from bilevel.training.random_search import Among, drawn_settings
from bilevel.training.run_dir import read_json, write_json

NAME = "trials.json"


def searched(setting: Setting, method: str) -> Config:
    """Return the configuration of a method with the settings that did best on valid.

    Trials are runs of `trial_steps` updates, in the folder `folder_of`; finished ones are not run again, also if other seeds
    are asked for now.

    Raises:
      TrainingDiverged: if every trial of the method diverged.
      Stopped: a signal stopped a trial.
    """
    if not _searches(setting.config, method) or setting.config.study.eval_only:
        return searched_before(setting.config, method)
    return with_settings(setting.config, method, _best(setting, method))


def searched_before(config: Config, method: str) -> Config:
    """Return the same of a search that an earlier command ended; the configuration given if there is none."""
    file = folder_of(config, method) / NAME
    if not _searches(config, method) or not file.exists():
        return config
    return with_settings(config, method, read_json(file)["best"]["settings"])


def folder_of(config: Config, method: str) -> Path:
    """Return where the trials of a method are."""
    tried = None if config.study.trials else METHODS[method].tried
    return config.study.run_dir / "search" / (method if tried is None else f"{method}_{tried.name}")


def trial_settings(method: str, seed: int, trial: int, most_specific: int | None = None) -> dict[str, Any]:
    """Return what a trial changes: nothing in trial 0, then what depends on method, seed and trial alone.

    `most_specific` is the largest `specific_batch_size`; None: any.
    """
    if trial == 0:
        return {}
    space = dict(METHODS[method].search)
    size = space.get("specific_batch_size")
    if isinstance(size, Among) and most_specific is not None:
        space["specific_batch_size"] = Among(tuple(dict.fromkeys(min(value, most_specific) for value in size.values)))
    return drawn_settings(space, [seed, zlib.crc32(method.encode())], trial)


def with_settings(config: Config, method: str, settings: dict[str, Any]) -> Config:
    """Return the configuration with other settings of a method, and perhaps another learning rate of θ."""
    own, optimizer = dict(settings), config.study.optimizer
    optimizer = dataclasses.replace(optimizer, learning_rate=own.pop("learning_rate", optimizer.learning_rate))
    own_settings = dataclasses.replace(config.methods[method], **own)
    return config.with_method(method, own_settings).with_study(optimizer=optimizer)


class Trial(NamedTuple):
    """A run of a search."""

    settings: dict[str, Any]
    """What it changes."""
    context: Context


def trials(setting: Setting, method: str) -> list[Trial]:
    """Return the trials of a method; none for one without a search."""
    config, study, tried = setting.config, setting.config.study, METHODS[method].tried
    if not _searches(config, method):
        return []
    folder = folder_of(config, method)

    def planned() -> list[Any]:
        """The seed of the trials that are there, so that seeds that are added later take what was found; and the settings."""
        known = [seed for name, seed in begun(folder / "0") if name == method]
        seed = study.seed if study.seed in known else min(known, default=study.seed)
        if study.trials:
            rows = len(setting.splits.specific)
            most = max(rows - rows % setting.mesh.size, 1)
            return [seed, [trial_settings(method, seed, number, most) for number in range(study.trials)]]
        assert tried is not None
        return [seed, [{tried.name: value} for value in tried.values(study)]]

    seed, found = of_first(planned)
    steps, no_finetuning = study.trial_steps or max(1, study.steps // 4), dataclasses.replace(study.finetune, steps=0)
    short = config.with_study(steps=steps, schedule_steps=0, finetune=no_finetuning, judge=False)
    configs = [with_settings(short, method, settings) for settings in found]
    contexts = [setting.of(own).at(folder / str(n)).context(method, seed) for n, own in enumerate(configs)]
    return list(map(Trial, found, contexts))


def _searches(config: Config, method: str) -> bool:
    tried = METHODS[method].tried
    return bool(config.study.trials) or (tried is not None and getattr(config.methods[method], tried.name) is None)


def _best(setting: Setting, method: str) -> dict[str, Any]:
    """Run all trials of a method, and keep what each gave."""
    measure, progress, all_trials = setting.task.measures[0], setting.config.study.progress, trials(setting, method)
    name, sign = f"valid_{measure.name}", measure.sign
    done = []
    for number, trial in enumerate(all_trials, 1):
        if progress:
            say(f"{method}, trial {number} of {len(all_trials)}: {trial.settings or 'preset'}")
        result = attempt(trial.context)
        done.append({"settings": trial.settings, name: result.get(name, sign * math.inf)})
    best = of_first(lambda: min(done, key=lambda trial: sign * trial[name]))
    if not math.isfinite(best[name]):
        raise TrainingDiverged(f"All {len(done)} trials of {method} diverged: lower --optimizer.learning-rate.")
    write_json(folder_of(setting.config, method) / NAME, {"best": best, "trials": done})
    if progress:
        say(f"{method}: best on valid with {best['settings'] or 'its preset'}")
    return best["settings"]
