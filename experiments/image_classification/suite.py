"""All methods and seeds of a comparison, under the same budget of steps."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bilevel.training import TrainingDiverged
from experiments import diverged
from experiments.image_classification import comparison
from experiments.image_classification.checks import check_flags, check_method
from experiments.image_classification.config import SELECTING, Config
from experiments.image_classification.data import SHOWN_CLASSES, ImageData
from experiments.image_classification.faults import load_data
from experiments.image_classification.run import MAY_CHANGE, identity, run
from experiments.runs import RESULT_NAME, run_name


def run_suite(config: Config) -> None:
    """Does all that the flags ask for, prints the tables, and skips what is done.

    Raises:
      UserError: for flags or data that are not possible, and at the end for runs that diverged.
      Stopped: a signal stopped a run.
    """
    methods = config.methods()
    check_flags(config, methods)
    data = load_data(config)
    if data.classes > SHOWN_CLASSES:
        print(f"Shares of classes are left out: {data.classes} classes, more than {SHOWN_CLASSES}.", file=sys.stderr)
    if config.data.limit is None and config.data.imbalance == 1.0:  # which may leave classes out
        _warn_of_classes(data)
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
            results.append(_attempt(config, method, seed, data))
    if config.eval_only:
        print(comparison.table(results))
        return
    print(comparison.compare(config, results, data))
    print(f"\nReport: {config.run_dir / 'report.html'}")
    diverged.refuse(results)


def _attempt(config: Config, method: str, seed: int, data: ImageData) -> dict[str, Any]:
    """The summary of a run; of one that diverged, now or in an earlier start, where that is said.

    Raises:
      TrainingDiverged: of the only run.
      Stopped: a signal stopped it before its end.
    """
    folder = config.run_dir / run_name(method, seed)
    settings = diverged.settled(identity(config, method, seed, data), MAY_CHANGE)
    known = not (folder / RESULT_NAME).exists() and diverged.noted(folder, settings)
    alone = len(config.methods()) * config.seeds == 1 and not config.eval_only
    if not known or alone:
        try:
            return run(config, method, seed, data)
        except TrainingDiverged as error:
            if alone:
                raise
            diverged.note(folder, error, settings)
    row = {"method": method, "seed": seed, diverged.WHERE: str(folder)}
    diverged.tell(folder, row)
    return row


def _warn_of_classes(data: ImageData) -> None:
    """Labels that begin at 1, or jump, make classes that have no rows."""
    parts = [
        part.arrays for part in (data.sets.train, data.sets.dev, data.sets.holdout, data.sets.test) if part is not None
    ]
    seen = np.unique(np.concatenate([arrays.get("clean_label", arrays["label"]) for arrays in parts]))
    if not data.sets.class_names and len(seen) < data.classes:
        absent = np.setdiff1d(np.arange(data.classes), seen)
        print(
            f"warning: {len(absent)} of the {data.classes} classes have no rows (the first is {absent[0]}): number classes "
            "from 0, without gaps, or name them.",
            file=sys.stderr,
        )
