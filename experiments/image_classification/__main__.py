"""Image classification with learned data weights (Wang et al., 2020) and online batch selection (Mindermann et al., 2022).

    python -m experiments.image_classification
    python -m experiments.image_classification --data.source tfds:cifar10 --model.network resnet18 --compare all

Prints tables, and writes them with metrics, checkpoints and a report into --run-dir. The README has expected numbers.
"""

from __future__ import annotations

from experiments import cli
from experiments.image_classification.config import Config
from experiments.image_classification.suite import run_suite


def main(config: Config) -> None:
    """Runs all methods and seeds, and writes the comparison."""
    run_suite(config)


if __name__ == "__main__":
    cli.run(Config, main)
