"""Image classification with learned data weights (Wang et al., 2020) and online batch selection (Mindermann et al., 2022).

    python -m experiments.image_classification
    python -m experiments.image_classification --data.source tfds:cifar10 --model.network resnet18 --compare all

Prints tables, and writes them with metrics, checkpoints and a report into --run-dir. The README has expected numbers.
"""

from __future__ import annotations

import sys

from experiments import cli
from experiments.image_classification.config import Config
from experiments.image_classification.suite import run_suite
from experiments.runs import STOPPED, Stopped


def main(config: Config) -> None:
    """Runs all methods and seeds, and writes the comparison."""
    try:
        run_suite(config)
    except Stopped:
        print(f"Stopped and saved; the same command continues in {config.run_dir}.", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    cli.run(Config, main)
