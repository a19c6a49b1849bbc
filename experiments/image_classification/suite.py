"""All methods and seeds of a comparison, under the same budget of steps."""

from __future__ import annotations

import sys
from typing import Any

from experiments.image_classification import comparison
from experiments.image_classification.checks import check_flags, check_method
from experiments.image_classification.config import SELECTING, Config
from experiments.image_classification.data import SHOWN_CLASSES
from experiments.image_classification.faults import load_data
from experiments.image_classification.run import run


def run_suite(config: Config) -> None:
    """Does all that the flags ask for, prints the tables, and skips what is done.

    Raises:
      UserError: for flags or data that are not possible.
      Stopped: a signal stopped a run.
    """
    methods = config.methods()
    check_flags(config, methods)
    data = load_data(config)
    if data.classes > SHOWN_CLASSES:
        print(f"Shares of classes are left out: {data.classes} classes, more than {SHOWN_CLASSES}.", file=sys.stderr)
    for method in methods:
        check_method(config, method, data)
    if set(methods) & set(SELECTING) and config.big_batch_size > len(data.train):
        print(
            f"warning: --big-batch-size {config.big_batch_size} is more than the {len(data.train)} training rows: batches are "
            "picked from all of them.",
            file=sys.stderr,
        )
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
