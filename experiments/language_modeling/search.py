"""Random search over the settings of each method: as many trials for one as for another, judged on valid."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import zlib
from typing import Any, NamedTuple

import numpy as np

from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.run import run

NAME = "trials.json"


class Log(NamedTuple):
    """Drawn with a uniform logarithm."""

    low: float
    high: float


class Among(NamedTuple):
    """Drawn from a list with equal chances."""

    values: tuple[Any, ...]


_RATE = {"learning_rate": Log(1e-3, 8e-3)}
_WEIGHTS = _RATE | {"weight_learning_rate": Log(1e-3, 1e-1), "weight_decay": Among((0.0, 0.0, 0.1, 1.0))}
_AVERAGED = _WEIGHTS | {"average_specific": Among((0.8, 0.9, 0.95, 0.98))}

SPACES: dict[str, dict[str, Log | Among]] = {
    "uniform": _RATE,
    "mixing": _RATE | {"mixing_fraction": Among((0.0625, 0.125, 0.25, 0.5, 0.75))},
    "contrastive": _RATE | {"contrastive_start": Among((0.25, 0.5)), "contrastive_fraction": Among((0.03, 0.1, 0.3))},
    "classifier": _RATE | {"weight_learning_rate": Log(1e-3, 1e-1), "filter": Among(("top_k", "top_fraction"))},
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


def searched(config: Config, methods: list[str], corpora: Corpora) -> dict[str, Config]:
    """The configuration of each method with the settings that did best on the specific validation data.

    Trials are runs of `trial_steps` updates with the first seed, in `search/METHOD` of the run directory; finished ones are not
    run again.

    Returns:
      Method -> configuration, the one given without --trials.

    Raises:
      UserError: if every trial of a method diverged.
      Stopped: a signal stopped a trial.
    """
    if config.trials < 1:
        return dict.fromkeys(methods, config)
    return {method: with_settings(config, _best(config, method, corpora)) for method in methods}


def trial_settings(method: str, seed: int, trial: int) -> dict[str, Any]:
    """What a trial changes: nothing in trial 0, then a draw that depends on method, seed and trial alone."""
    if trial == 0:
        return {}
    rng = np.random.default_rng([seed, zlib.crc32(method.encode()), trial])
    drawn: dict[str, Any] = {}
    for name, space in SPACES[method].items():
        if isinstance(space, Log):
            value = math.exp(rng.uniform(math.log(space.low), math.log(space.high)))
            drawn[name] = float(f"{value:.3g}")
        else:
            drawn[name] = space.values[int(rng.integers(len(space.values)))]
    return drawn


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with other settings of the method, and perhaps another learning rate of θ."""
    own = {name: value for name, value in settings.items() if name != "learning_rate"}
    rate = settings.get("learning_rate", config.learning_rate)
    return dataclasses.replace(config, learning_rate=rate, weights=dataclasses.replace(config.weights, **own))


def _best(config: Config, method: str, corpora: Corpora) -> dict[str, Any]:
    folder = config.run_dir / "search" / method
    steps = config.trial_steps or max(1, config.steps // 4)
    trials = []
    for number in range(config.trials):
        settings = trial_settings(method, config.seed, number)
        if config.progress:
            print(f"{method}, trial {number + 1} of {config.trials}: {settings or 'preset'}", file=sys.stderr)
        trial = dataclasses.replace(
            with_settings(config, settings),
            steps=steps,
            schedule_steps=0,
            finetune_steps=0,
            run_dir=folder / str(number),
        )
        try:
            result = run(trial, method, config.seed, corpora)
        except TrainingDiverged:
            result = {"specific_valid_loss": math.inf}
        trials.append({"settings": settings, "specific_valid_loss": result["specific_valid_loss"]})
    best = min(trials, key=lambda trial: trial["specific_valid_loss"])
    if not math.isfinite(best["specific_valid_loss"]):
        raise UserError(f"All {config.trials} trials of {method} diverged: lower --learning-rate.")
    write_atomically(folder / NAME, json.dumps({"best": best, "trials": trials}, indent=2) + "\n")
    return best["settings"]
