"""The domain classifier of the experiment's data."""

from __future__ import annotations

import numpy as np
import optax

from bilevel.data import Dataset, Loader
from bilevel.offline.domain_classifier import DomainClassifier, train_domain_classifier
from bilevel.types import Batch, LogitFn, Params, UserError
from experiments.language_modeling.corpora import Corpora

EVALUATION_ROWS = 2048


def train_classifier(
    weighting: LogitFn, weight_params: Params, corpora: Corpora, *, seed: int, steps: int, rows: int, rate: float
) -> DomainClassifier:
    """Trains on batches with as many specific as generic rows, and keeps the best on valid.

    Args:
      weighting: its logits are those of "specific".
      weight_params: where to begin.
      corpora: the training rows, and the held-out ones that decide which parameters are kept.
      seed: order of the rows.
      steps: updates; evaluated up to 100 times on the way.
      rows: most rows of either kind in a batch.
      rate: Adam's learning rate.

    Raises:
      UserError: for steps or rows below 1.
    """
    if steps < 1 or rows < 1:
        raise UserError(
            f"--weights.classifier-steps {steps} and --weights.classifier-rows {rows} must both be at least 1."
        )
    train = [corpora.generic_train, corpora.specific["train"]]
    generic, specific = (Loader(data, min(rows, len(data)), seed=seed + i) for i, data in enumerate(train, 3_000_000))
    held_out = _spread(corpora.generic_valid), _spread(corpora.specific["valid"])
    return train_domain_classifier(
        weighting, weight_params, generic, specific, held_out, optimizer=optax.adam(rate), steps=steps
    )


def _spread(data: Dataset) -> Batch:
    """At most `EVALUATION_ROWS` rows, at even distances from the whole."""
    return data.rows(np.linspace(0, len(data) - 1, min(EVALUATION_ROWS, len(data))).astype(np.int64))
