"""Any labelled arrays, rows of features, with learned data weights and online batch selection.

    python -m experiments.tabular
    python -m experiments.tabular --data.source my.csv --data.label species --data.noise none --compare all

The experiment is that of `experiments.image_classification`, with defaults for tables: a .npz, .csv or .parquet file.
"""

from __future__ import annotations

from pathlib import Path

from experiments import cli
from experiments.image_classification.__main__ import main
from experiments.image_classification.config import Config, DataConfig, ModelConfig

DEFAULTS = Config(
    steps=500,
    batch_size=16,
    big_batch_size=160,
    run_dir=Path("runs/tabular"),
    data=DataConfig(source="sklearn:breast_cancer", noise_fraction=0.2),
    model=ModelConfig(network="mlp", width=64),
)
"""569 rows of 30 features in two classes, a fifth of the training labels wrong."""
DESCRIPTION = """Classification of rows of features with learned data weights and online batch selection.

The experiment of `python -m experiments.image_classification` on labelled arrays. By default: breast cancer data that come with
scikit-learn, 20 % of the training labels wrong."""

if __name__ == "__main__":
    cli.run(Config, main, default=DEFAULTS, description=DESCRIPTION)
