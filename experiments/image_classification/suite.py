"""All methods and seeds of a comparison, under the same budget of steps."""

from __future__ import annotations

import sys
from typing import Any

from bilevel.types import UserError
from experiments.image_classification import comparison, sampled
from experiments.image_classification.config import SAMPLED, Config
from experiments.image_classification.data import SHOWN_CLASSES
from experiments.image_classification.faults import load_data
from experiments.image_classification.run import run


def run_suite(config: Config) -> None:
    """Does all that the flags ask for, prints the tables, and skips what is done.

    Raises:
      UserError: for flags or data that are not possible.
      Stopped: a signal stopped a run.
    """
    _check(config)
    methods = config.methods()
    data = load_data(config)
    if data.classes > SHOWN_CLASSES:
        print(f"Shares of classes are left out: {data.classes} classes, more than {SHOWN_CLASSES}.", file=sys.stderr)
    for method in methods:
        if method in SAMPLED:
            sampled.check(config, method, data)
    results: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        for method in methods:
            if config.progress:
                print(f"{method}, seed {seed}", file=sys.stderr)
            results.append(run(config, method, seed, data))
    if config.eval_only:
        print(comparison.table(results))
        return
    print(comparison.compare(config, results, data))
    print(f"\nReport: {config.run_dir / 'report.html'}")


def _check(config: Config) -> None:
    for name in ("seeds", "steps", "batch_size", "evaluate_every", "micro_batches"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1.")
    if config.weights.il_steps < 1:
        raise UserError(f"--weights.il-steps {config.weights.il_steps} must be at least 1.")
    if any(not 0 < target <= 1 for target in config.targets):
        raise UserError(f"--targets {' '.join(map(str, config.targets))}: accuracies lie between 0 and 1.")
