"""Language modelling with learned data weights, after Grangier, Ablin and Hannun (2024), section 5.2.

    python -m experiments.language_modeling
    python -m experiments.language_modeling --data.generic heap.txt.gz --data.specific my_domain.txt --steps 6000

Prints a table, and writes it with metrics, checkpoints and a report into --run-dir. The README has expected numbers.
"""

from __future__ import annotations

import sys

import jax

from bilevel import sharding
from bilevel.types import UserError
from experiments import cli
from experiments.language_modeling import build, comparison
from experiments.language_modeling.config import Config
from experiments.language_modeling.run import run

STOPPED = 3
"""Exit code of a run that a signal stopped after saving."""


def main(config: Config) -> None:
    """Runs all methods and seeds, and writes the comparison."""
    if config.seeds < 1:
        raise UserError(f"--seeds {config.seeds} must be at least 1.")
    if config.steps < 1:
        raise UserError(f"--steps {config.steps} must be at least 1.")
    methods = config.methods()
    if config.coordinator is not None:
        address = None if config.coordinator == "auto" else config.coordinator
        sharding.start_processes(address, config.processes, config.process)
    corpora = build.load_corpora(config)
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        for method in methods:
            if config.progress and jax.process_index() == 0:
                print(f"{method}, seed {seed}", file=sys.stderr)
            result = run(config, method, seed, corpora)
            if result is None:
                print(f"Stopped and saved; the same command continues in {config.run_dir}.", file=sys.stderr)
                sys.exit(STOPPED)
            results.append(result)
    if jax.process_index() != 0:
        return
    if config.eval_only:
        print(comparison.table(results))
        return
    print(comparison.compare(config, results, corpora))
    print(f"\nReport: {config.run_dir / 'report.html'}")


if __name__ == "__main__":
    cli.run(Config, main)
