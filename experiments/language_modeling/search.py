"""Search over the settings of each method, judged on valid: as many random trials for one as for another, and, without trials,
the fraction of `mixing`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import CONFIG_NAME, anything_saved, write_atomically
from experiments.language_modeling.build import mixed_rows
from experiments.language_modeling.config import Config, settings_of
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.diverged import attempt
from experiments.runs import of_first, read_json, run_name

NAME = "trials.json"


class Log(NamedTuple):
    """Drawn with a uniform logarithm."""

    low: float
    high: float


class Among(NamedTuple):
    """Taken from a list in a drawn order, each once before any comes again."""

    values: tuple[Any, ...]


_RATE = {"learning_rate": Log(1e-3, 8e-3)}
_WEIGHTS = _RATE | {"weight_learning_rate": Log(1e-3, 1e-1), "weight_decay": Among((0.0, 0.0, 0.1, 1.0))}
_AVERAGED = _WEIGHTS | {"average_specific": Among((0.8, 0.9, 0.95, 0.98))}

SPACES: dict[str, dict[str, Log | Among]] = {
    "uniform": _RATE,
    "mixing": _RATE | {"mixing_fraction": Among((0.0625, 0.125, 0.25, 0.5, 0.75, 0.875))},
    "contrastive": _RATE | {"contrastive_start": Among((0.25, 0.5)), "contrastive_fraction": Among((0.03, 0.1, 0.3))},
    "classifier": _RATE
    | {"weight_learning_rate": Log(1e-3, 1e-1), "filter": Among(("top_k", "top_fraction", "threshold"))},
    "meta_weight_net": _AVERAGED,
    "learning_to_reweight": _RATE | {"specific_batch_size": Among((16, 64, 256))},
    "dds": _AVERAGED,
    "anograd": _AVERAGED,
    "soba": _WEIGHTS | {"tracker_learning_rate": Log(5e-4, 1e-2), "damping": Among((0.0, 0.05))},
    "warm_soba": _WEIGHTS | {"tracker_learning_rate": Log(5e-4, 1e-2), "classifier_steps": Among((100, 300, 1000))},
    "penalty": _WEIGHTS | {"tracker_learning_rate": Log(5e-4, 1e-2), "penalty_strength": Log(0.1, 10.0)},
    "implicit_cg": _AVERAGED | {"damping": Log(1e-2, 10.0), "iterations": Among((3, 5, 10))},
    "implicit_neumann": _AVERAGED
    | {"damping": Log(1e-2, 10.0), "neumann_step_size": Log(1e-2, 1.0), "iterations": Among((3, 5, 10))},
    "frozen": _RATE,
}
"""What is searched for each method: names of --weights flags, and the learning rate of θ."""


FRACTIONS = (0.125, 0.25, 0.5, 0.75)
"""What `mixing` tries where neither a fraction nor --trials is given; Grangier et al. select it by validation, too."""


class Search(NamedTuple):
    """What is tried for a method."""

    seed: int
    """Of the trials: that of the command that began them."""
    settings: list[dict[str, Any]]
    """What each trial changes."""


def searched(config: Config, method: str, corpora: Corpora) -> Config:
    """The configuration of a method with the settings that did best on the specific validation data.

    Trials are runs of `trial_steps` updates, in the folder `folder_of`; finished ones are not run again, also if
    other seeds are asked for now.

    Returns:
      The configuration, the one given where nothing is to be searched; with --eval-only, that of an earlier search.

    Raises:
      TrainingDiverged: if every trial of the method diverged.
      Stopped: a signal stopped a trial.
    """
    found = of_first(lambda: _found_before(config, method) if config.eval_only else _fraction_of_before(config, method))
    if config.eval_only or found:
        return with_settings(config, found)
    return with_settings(config, _best(config, method, corpora)) if _searches(config, method) else config


def searched_before(config: Config, method: str) -> Config:
    """Likewise, of a search that an earlier command ended; the configuration given if there is none."""
    return with_settings(config, _found_before(config, method))


def trial_configs(config: Config, method: str, corpora: Corpora) -> list[Config]:
    """The configurations of a method's trials."""
    if not _searches(config, method) or of_first(lambda: _fraction_of_before(config, method)):
        return []
    tried = _search(config, method, corpora).settings
    return [_trial(config, method, number, settings) for number, settings in enumerate(tried)]


def _searches(config: Config, method: str) -> bool:
    return bool(config.trials) or (method == "mixing" and config.weights.mixing_fraction is None)


def _found_before(config: Config, method: str) -> dict[str, Any]:
    file = folder_of(config, method) / NAME
    if _searches(config, method) and file.exists():
        return read_json(file)["best"]["settings"]
    return _fraction_of_before(config, method)


def _fraction_of_before(config: Config, method: str) -> dict[str, Any]:
    """The fraction of runs of `mixing` that were begun before there was a search for it: with that they go on."""
    if config.trials or not _searches(config, method) or folder_of(config, method).exists():
        return {}
    begun = [folder for folder in config.run_dir.glob(f"{method}-seed*") if anything_saved(folder)]
    begun.sort(key=lambda folder: (folder.name != run_name(method, config.seed), folder.name))
    return {"mixing_fraction": read_json(begun[0] / CONFIG_NAME)["weights"]["mixing_fraction"]} if begun else {}


def _search(config: Config, method: str, corpora: Corpora) -> Search:
    def found() -> list[Any]:
        seed = _seed(config, method)
        if not config.trials:
            rows = {mixed_rows(fraction, config.batch_size, jax.process_count()) for fraction in FRACTIONS}
            return [seed, [{"mixing_fraction": count / config.batch_size} for count in sorted(rows)]]
        return [seed, [_settings(config, method, seed, corpora, number) for number in range(config.trials)]]

    return Search(*of_first(found))


def _seed(config: Config, method: str) -> int:
    """The seed of the trials that are there, so that seeds that are added later take what was found; else that of the flags."""
    folders = folder_of(config, method).glob(f"0/{method}-seed*")
    names = [folder.name.rsplit("-seed", 1)[1] for folder in folders if anything_saved(folder)]
    begun = [int(name) for name in names if name.isdecimal()]
    return config.seed if config.seed in begun else min(begun, default=config.seed)


def trial_settings(method: str, seed: int, trial: int, most_specific: int | None = None) -> dict[str, Any]:
    """What a trial changes: nothing in trial 0, then what depends on method, seed and trial alone.

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
    for name, space in SPACES[method].items():
        if isinstance(space, Log):
            value = math.exp(rng.uniform(math.log(space.low), math.log(space.high)))
            drawn[name] = float(f"{value:.3g}")
            continue
        values = space.values
        if name == "specific_batch_size" and most_specific is not None:
            values = tuple(dict.fromkeys(min(value, most_specific) for value in values))
        again, place = divmod(trial - 1, len(values))
        order = np.random.default_rng([*key, zlib.crc32(name.encode()), again]).permutation(len(values))
        drawn[name] = values[order[place]]
    return drawn


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with other settings of the method, and perhaps another learning rate of θ."""
    own = {name: value for name, value in settings.items() if name != "learning_rate"}
    rate = settings.get("learning_rate", config.learning_rate)
    return dataclasses.replace(config, learning_rate=rate, weights=dataclasses.replace(config.weights, **own))


def _settings(config: Config, method: str, seed: int, corpora: Corpora, number: int) -> dict[str, Any]:
    """What a trial changes; one that was begun keeps its settings, also where they are drawn in another way now."""
    directory = folder_of(config, method) / str(number) / run_name(method, seed)
    file = directory / CONFIG_NAME
    if file.exists() and anything_saved(directory):
        kept = read_json(file)
        kept = {"learning_rate": kept["learning_rate"], **kept["weights"]}
        now = {} if number else {"learning_rate": config.learning_rate, **settings_of(config, method)}
        return {name: kept[name] for name in SPACES[method] if name in kept and kept[name] != now.get(name, kept)}
    rows, devices = len(corpora.specific["train"]), jax.device_count()
    return trial_settings(method, seed, number, max(rows - rows % devices, 1))


def folder_of(config: Config, method: str) -> Path:
    """Where the trials of a method are: `search/METHOD`, or `search/mixing_fraction` without --trials."""
    return config.run_dir / "search" / (method if config.trials else f"{method}_fraction")


def _trial(config: Config, method: str, number: int, settings: dict[str, Any]) -> Config:
    return dataclasses.replace(
        with_settings(config, settings),
        steps=config.trial_steps or max(1, config.steps // 4),
        schedule_steps=0,
        finetune_steps=0,
        run_dir=folder_of(config, method) / str(number),
    )


def _best(config: Config, method: str, corpora: Corpora) -> dict[str, Any]:
    first, (seed, tried) = jax.process_index() == 0, _search(config, method, corpora)
    losses = []
    for number, settings in enumerate(tried):
        if config.progress and first:
            print(f"{method}, trial {number + 1} of {len(tried)}: {settings or 'preset'}", file=sys.stderr)
        result = attempt(_trial(config, method, number, settings), method, seed, corpora)
        losses.append(result.get("specific_valid_loss", math.inf))
    losses = of_first(lambda: losses)
    trials = [{"settings": own, "specific_valid_loss": loss} for own, loss in zip(tried, losses, strict=True)]
    best = min(trials, key=lambda trial: trial["specific_valid_loss"])
    if not math.isfinite(best["specific_valid_loss"]):
        raise TrainingDiverged(f"All {len(tried)} trials of {method} diverged: lower --learning-rate.")
    if first:
        text = json.dumps({"best": best, "trials": trials}, indent=2)
        write_atomically(folder_of(config, method) / NAME, text + "\n")
        if config.progress:
            print(f"{method}: best on valid with {best['settings'] or 'its preset'}", file=sys.stderr)
    return best["settings"]
