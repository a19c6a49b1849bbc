"""Language modelling with learned data weights, after Grangier, Ablin and Hannun (2024), section 5.2.

    python -m experiments.language_modeling
    python -m experiments.language_modeling --data.generic heap.txt.gz --data.specific my_domain.txt --steps 6000

Prints a table, and writes it with metrics, checkpoints and a report into --run-dir. The README has expected numbers.
"""

from __future__ import annotations

from bilevel.devices import sharding
from experiments import cli
from experiments.language_modeling import build
from experiments.language_modeling.config import Config
from experiments.language_modeling.suite import run_suite


def main(config: Config) -> None:
    """Runs all methods, seeds and specific sets, and writes the comparison."""
    config.check_numbers()
    methods = config.methods()
    if config.coordinator is not None:
        address = None if config.coordinator == "auto" else config.coordinator
        sharding.start_processes(address, config.processes, config.process)
    build.check_rows(config, methods)
    run_suite(config)


if __name__ == "__main__":
    cli.run(Config, main)
