"""Scorers: logits of rows that may depend on the main model.

A plain weighting network, `logits(weight_params, batch)`, never sees θ. A `Scorer` does, through *features*: arrays that the
main model gives for each row (its loss, the entropy of its prediction, the norm of its gradient), evaluated once a step
and without a gradient. Logits are a function of the features; rows that the filter picks keep theirs, so that the
α-gradient evaluates no feature again.

Features see the model state but cannot change it: scoring never moves BatchNorm statistics. A loss that normalises by
the statistics of the batch at hand normalises a scored row by those of the rows that it is scored with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.rows import RowLosses
from bilevel.types import Array, Batch, LogitFn, LossFn, Metrics, ModelState, Params, UserError

Features: TypeAlias = Any
"""A pytree of arrays with the rows as their leading axis; `()` when there are none."""
FeatureFn: TypeAlias = Callable[[Params, ModelState, Batch, Array], Features]
"""`features(params, model_state, batch, rng)` -> features of the batch's rows."""


class Scorer(NamedTuple):
    """What gives rows their logits, in two parts."""

    features: FeatureFn
    """Evaluated once a step, on the big batch, at the θ of that step. Costs what it costs for B rows."""
    logits: Callable[[Params, Batch, Features], Array]
    """`logits(weight_params, batch, features)` -> float32 `[B]`. Differentiated in weight_params alone."""
    loss: LossFn | None = None
    """Set if the features are nothing but the per-row losses of this function. In dense mode, if it is the very loss that θ is
    trained on, they are then taken from the θ-update's own evaluation, and scoring costs no forward pass."""


def of_logits(weighting: LogitFn) -> Scorer:
    """Make a scorer without features of a plain weighting network."""
    return Scorer(
        lambda params, model_state, batch, rng: (), lambda weights, batch, features: weighting(weights, batch)
    )


def bounded(weighting: LogitFn, bound: float) -> LogitFn:
    """Squash the logits of a weighting network into ± bound, s ↦ bound · tanh(s / bound).

    Ours. Without it learned logits grow for as long as α is updated; with it the rows of which the network is sure weigh alike.

    Args:
      weighting: the network.
      bound: in nats, at least 0; 0: the logits stay as they are.

    Raises:
      UserError: if the bound is negative or not finite.
    """
    if not 0 <= bound < math.inf:
        raise UserError(f"A bound of {bound} on the logits must be a number of at least 0; 0 is none.")
    return (lambda weights, batch: bound * jnp.tanh(weighting(weights, batch) / bound)) if bound else weighting


def no_logits(weight_params: Params, batch: Batch) -> Array:
    """Give every row the logit 0, where there is no weighting network."""
    return jnp.zeros(trees.num_rows(batch))


def of_losses(loss: LossFn, logits: Callable[[Params, Batch, Array], Array], *, micro_batches: int = 1) -> Scorer:
    """Score rows by a function of the main model's losses, s_i = logits(ℓ_i).

    In sparse mode a step evaluates B losses more than with a plain network: B forward passes of the main model, on every
    step. In dense mode see `Scorer.loss`.

    Args:
      loss: see `bilevel.types.LossFn`; that of `make_step`, or another (without dropout, say).
      logits: weight parameters, batch and losses -> float32 `[B]`.
      micro_batches: see `loss_features`.
    """
    return Scorer(loss_features(loss, micro_batches=micro_batches), logits, loss)


def loss_features(loss: LossFn, *, micro_batches: int = 1) -> FeatureFn:
    """Make features of the main model's losses, float32 `[B]`.

    Arguments as `model_features`.
    """
    return model_features(loss, lambda losses, metrics, batch: losses, micro_batches=micro_batches)


def model_features(
    loss: LossFn, read: Callable[[Array, Metrics, Batch], Array], *, micro_batches: int = 1
) -> FeatureFn:
    """Make features of one evaluation of the main model, float32 `[B]`.

    They are stop-gradiented.

    The new model state that the loss returns is thrown away.

    Args:
      loss: see `bilevel.types.LossFn`.
      read: losses `[B]`, the loss's metrics (see `bilevel.types.LossAux`) and the batch -> `[B]`.
      micro_batches: score in this many equal parts, one after the other, for the activations of B rows may not fit.

    Raises:
      UserError: for micro_batches below 1; when traced, if it does not divide the rows of a device.
    """
    if micro_batches < 1:
        raise UserError(f"Scoring with micro_batches={micro_batches}: it must be at least 1.")

    def features(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> Array:
        losses, aux = RowLosses(loss, model_state, batch, rng, micro_batches)(params)
        return as_features(read(losses, aux.metrics, batch))

    return features


def as_features(losses: Array) -> Array:
    """Return the losses without derivative, in at least float32."""
    return jax.lax.stop_gradient(trees.widen(losses))


def check_features(features: Features, batch: Batch) -> None:
    """Reject features whose leading axis is not that of the batch.

    Raises:
      UserError: naming the first such array.
    """
    rows = trees.num_rows(batch)
    for path, x in jax.tree_util.tree_leaves_with_path(features):
        if x.shape[:1] != (rows,):
            raise UserError(
                f"The scorer's features{jax.tree_util.keystr(path)} have the shape {x.shape} for a batch of {rows} rows; "
                f"their leading axis must be {rows}, one entry a row."
            )
