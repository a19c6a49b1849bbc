"""The domain classifier: the weighting network trained to tell specific rows from generic ones."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.data import Dataset, Loader
from bilevel.types import Array, Batch, LogitFn, Params, UserError
from experiments.language_modeling.corpora import Corpora

EVALUATIONS = 100
"""Often, as the classifier of a small specific set is at its best after a few steps."""
EVALUATION_ROWS = 2048


class Classifier(NamedTuple):
    """A trained classifier; its logit ranks the generic rows."""

    weight_params: Params
    valid_loss: float
    """Binary cross-entropy on held-out rows, as many generic as specific, in nats; log 2 for a coin."""
    seconds: float


def train_classifier(
    weighting: LogitFn, weight_params: Params, corpora: Corpora, *, seed: int, steps: int, rows: int, rate: float
) -> Classifier:
    """Minimises the binary cross-entropy on batches with as many specific as generic rows, and keeps the best on valid.

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

    Reference: Grangier, Ablin, Hannun, section 5.1 ("domain classifier").
    """
    if steps < 1 or rows < 1:
        raise UserError(f"The classifier was given {steps} steps of {rows} rows; both must be at least 1.")
    optimizer = optax.adam(rate)

    def loss(params: Params, generic: Batch, specific: Batch) -> Array:
        return 0.5 * (
            jnp.mean(jax.nn.softplus(weighting(params, generic)))
            + jnp.mean(jax.nn.softplus(-weighting(params, specific)))
        )

    @jax.jit
    def update(params: Params, opt_state: optax.OptState, generic: Batch, specific: Batch) -> tuple[Params, object]:
        updates, opt_state = optimizer.update(jax.grad(loss)(params, generic, specific), opt_state)
        return optax.apply_updates(params, updates), opt_state

    train = [corpora.generic_train, corpora.specific["train"]]
    loaders = [Loader(data, min(rows, len(data)), seed=seed + i) for i, data in enumerate(train, 3_000_000)]
    valid = [_spread(data, EVALUATION_ROWS) for data in (corpora.generic_valid, corpora.specific["valid"])]
    evaluate, opt_state = jax.jit(loss), optimizer.init(weight_params)
    began, best, best_loss = time.perf_counter(), weight_params, float(evaluate(weight_params, *valid))
    every = -(-steps // EVALUATIONS)
    for step in range(steps):
        weight_params, opt_state = update(weight_params, opt_state, *(loader.batch(step) for loader in loaders))
        if (step + 1) % every == 0 or step + 1 == steps:
            found = float(evaluate(weight_params, *valid))
            if found < best_loss:
                best, best_loss = weight_params, found
    return Classifier(best, best_loss, time.perf_counter() - began)


def _spread(data: Dataset, limit: int) -> Batch:
    """At most `limit` rows, at even distances from the whole."""
    return data.rows(np.linspace(0, len(data) - 1, min(limit, len(data))).astype(np.int64))
