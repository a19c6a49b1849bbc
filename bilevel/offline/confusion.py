"""Which classes a trained model takes for which others."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from bilevel.data.labelled.corruption import most_confused
from bilevel.data.loading.arrays import ArrayDataset
from bilevel.offline.irreducible import score_rows
from bilevel.types import LossFn, ModelState, Params


def confused_classes(
    loss: LossFn, params: Params, model_state: ModelState, parts: Sequence[ArrayDataset], classes: int, count: int
) -> dict[int, int]:
    """Return the classes that a model mistakes most often, each with the class it takes them for.

    Args:
      loss: in evaluation mode, with the metric `logits` `[b, C]`.
      params: of the trained model.
      model_state: of the trained model.
      parts: rows with `label`, which the model was not trained on.
      classes: C.
      count: how many classes.
    """
    confusion = np.zeros((classes, classes))
    for part in parts:
        table = score_rows(
            loss, params, model_state, part, batch_size=512, settings={},
            read=lambda losses, metrics, batch: jnp.argmax(metrics["logits"], axis=-1),
        )  # fmt: skip
        np.add.at(confusion, (part.arrays["label"], table.losses.astype(np.int64)), 1)
    return most_confused(confusion, min(count, classes))
