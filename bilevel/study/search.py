"""Search over the settings of each method, judged on valid: as many random trials for one as for another.

Without trials, the one setting of a method that is chosen on valid by its specification (the fraction of `mixing`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.study import files
from bilevel.study.config import Config
from bilevel.study.diverged import attempt
from bilevel.study.methods.plain import FRACTIONS, mixed_rows
from bilevel.study.registry import METHODS
from bilevel.study.run import Setting
from bilevel.study.spec import Log
from bilevel.training import TrainingDiverged

NAME = "trials.json"


def searched(setting: Setting, method: str) -> Config:
    """Return the configuration of a method with the settings that did best on valid.

    Trials are runs of `trial_steps` updates, in the folder `folder_of`; finished ones are not run again, also if other seeds
    are asked for now.

    Raises:
      TrainingDiverged: if every trial of the method diverged.
      Stopped: a signal stopped a trial.
    """
    config = setting.config
    if not _searches(config, method):
        return config
    if config.study.eval_only:
        return searched_before(config, method)
    return with_settings(config, method, _best(setting, method))


def searched_before(config: Config, method: str) -> Config:
    """Return the same of a search that an earlier command ended; the configuration given if there is none."""
    file = folder_of(config, method) / NAME
    if not _searches(config, method) or not file.exists():
        return config
    return with_settings(config, method, files.read_json(file)["best"]["settings"])


def trial_configs(config: Config, method: str, most_specific: int) -> list[Config]:
    """Return the configurations of a method's trials."""
    if not _searches(config, method):
        return []
    _, tried = _search(config, method, most_specific)
    return [_trial(config, method, number, settings) for number, settings in enumerate(tried)]


def folder_of(config: Config, method: str) -> Path:
    """Return where the trials of a method are."""
    study, spec = config.study, METHODS[method]
    return study.run_dir / "search" / (method if study.trials else f"{method}_{spec.tried}")


def trial_settings(method: str, seed: int, trial: int, most_specific: int | None = None) -> dict[str, Any]:
    """Return what a trial changes: nothing in trial 0, then what depends on method, seed and trial alone.

    Args:
      method: its name.
      seed: of the search.
      trial: its number.
      most_specific: the largest `specific_batch_size`; None: any.
    """
    if trial == 0:
        return {}
    key = [seed, zlib.crc32(method.encode())]
    rng = np.random.default_rng([*key, trial])
    drawn: dict[str, Any] = {}
    for name, space in METHODS[method].search.items():
        if isinstance(space, Log):
            drawn[name] = float(f"{math.exp(rng.uniform(math.log(space.low), math.log(space.high))):.3g}")
            continue
        values = space.values
        if name == "specific_batch_size" and most_specific is not None:
            values = tuple(dict.fromkeys(min(value, most_specific) for value in values))
        again, place = divmod(trial - 1, len(values))
        order = np.random.default_rng([*key, zlib.crc32(name.encode()), again]).permutation(len(values))
        drawn[name] = values[order[place]]
    return drawn


def with_settings(config: Config, method: str, settings: dict[str, Any]) -> Config:
    """Return the configuration with other settings of a method, and perhaps another learning rate of θ."""
    own = {name: value for name, value in settings.items() if name != "learning_rate"}
    config = config.with_method(method, dataclasses.replace(config.methods[method], **own))
    if "learning_rate" not in settings:
        return config
    optimizer = dataclasses.replace(config.study.optimizer, learning_rate=settings["learning_rate"])
    return config.with_study(optimizer=optimizer)


def _searches(config: Config, method: str) -> bool:
    tried = METHODS[method].tried
    return bool(config.study.trials) or (tried is not None and getattr(config.methods[method], tried) is None)


def _search(config: Config, method: str, most_specific: int) -> tuple[int, list[dict[str, Any]]]:
    """The seed of the trials, and what each changes."""
    study = config.study

    def found() -> list[Any]:
        seed = _seed(config, method)
        if study.trials:
            return [seed, [trial_settings(method, seed, number, most_specific) for number in range(study.trials)]]
        tried = METHODS[method].tried
        rows = sorted({mixed_rows(fraction, study.batch_size, jax.process_count()) for fraction in FRACTIONS})
        return [seed, [{tried: count / study.batch_size} for count in rows]]

    seed, settings = files.of_first(found)
    return seed, settings


def _seed(config: Config, method: str) -> int:
    """The seed of the trials that are there, so that seeds that are added later take what was found; else that of the flags."""
    folders = [files.run_of(path) for path in folder_of(config, method).glob(f"0/{method}-seed*")]
    begun = [found[1] for found in folders if found is not None]
    return config.study.seed if config.study.seed in begun else min(begun, default=config.study.seed)


def _trial(config: Config, method: str, number: int, settings: dict[str, Any]) -> Config:
    study = config.study
    return with_settings(config, method, settings).with_study(
        steps=study.trial_steps or max(1, study.steps // 4),
        schedule_steps=0,
        finetune=dataclasses.replace(study.finetune, steps=0),
        run_dir=folder_of(config, method) / str(number),
    )


def most_specific(setting: Setting) -> int:
    """Return the largest specific batch that the data and the devices allow."""
    rows, devices = len(setting.splits.specific), setting.mesh.size
    return max(rows - rows % devices, 1)


def _best(setting: Setting, method: str) -> dict[str, Any]:
    config, measure = setting.config, setting.task.measures[0]
    sign, name = (1 if measure.lower_is_better else -1), f"valid_{measure.name}"
    seed, tried = _search(config, method, most_specific(setting))
    values = []
    for number, settings in enumerate(tried):
        if config.study.progress:
            files.say(f"{method}, trial {number + 1} of {len(tried)}: {settings or 'preset'}")
        result = attempt(setting.of(_trial(config, method, number, settings)), method, seed)
        values.append(result.get(name, sign * math.inf))
    values = files.of_first(lambda: values)
    trials = [{"settings": own, name: value} for own, value in zip(tried, values, strict=True)]
    best = min(trials, key=lambda trial: sign * trial[name])
    if not math.isfinite(best[name]):
        raise TrainingDiverged(f"All {len(tried)} trials of {method} diverged: lower --optimizer.learning-rate.")
    files.write_json(folder_of(config, method) / NAME, {"best": best, "trials": trials})
    if config.study.progress:
        files.say(f"{method}: best on valid with {best['settings'] or 'its preset'}")
    return best["settings"]
