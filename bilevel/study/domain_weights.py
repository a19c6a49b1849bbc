"""A number for each known domain instead of a weighting network over rows: the mixture of domains to train on."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bilevel.selection.known import Known
from bilevel.study.task import Splits, Weighting
from bilevel.types import Array, Batch, Params, UserError

NAME = "domains.json"
"""In the directory of a run: {domain: its share among rows drawn in proportion to the learned weights}."""


def domain_weighting(splits: Splits) -> Weighting:
    """Build a table of logits, one for each domain of the generic rows, 0 at first.

    A row's domain is looked up by its `id`; rows without one (specific ones mixed in, -1) share a logit of their own.

    Raises:
      UserError: the domains of the rows are not known.
    """
    known = _domains(splits)
    values, others = jnp.asarray(known.values, jnp.int32), len(known.names)

    def logits(weights: Params, batch: Batch) -> Array:
        domain = jnp.where(batch["id"] >= 0, values[jnp.maximum(batch["id"], 0)], others)
        return weights["logit"][domain]

    return Weighting(lambda key: {"logit": jnp.zeros(others + 1, jnp.float32)}, logits)


def mixture(splits: Splits, alpha: Params) -> dict[str, float]:
    """Return the share of each domain among rows drawn in proportion to their weights; the shares sum to 1."""
    known = _domains(splits)
    logits = np.asarray(alpha["logit"], np.float64)[: len(known.names)]
    weights = np.bincount(known.values, minlength=len(known.names)) * np.exp(logits - logits.max())
    return {name: float(weight) for name, weight in zip(known.names, weights / weights.sum(), strict=True)}


def _domains(splits: Splits) -> Known:
    found = next((known for known in splits.known.values() if not known.fault), None)
    if found is None:
        raise UserError("--weigh domains needs the domain of each generic row: give --data.generic-labels, or omit it.")
    return found
