"""The rows that a step works on: scored, filtered, and given their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.rows import Weights
from bilevel.devices.axis import Axis
from bilevel.devices.sharding import spread_rows
from bilevel.selection import filters, picking
from bilevel.selection.scorers import Features, Scorer, as_features
from bilevel.state import TrainState
from bilevel.step import estimators
from bilevel.step.options import StepOptions
from bilevel.step.problem import Evaluations
from bilevel.types import Array, Batch, Params, UserError


class Keys(NamedTuple):
    """Random keys of one step."""

    filter: Array
    alpha: Array
    loss: Array
    specific: Array
    features: Array
    method: Array


def keys_of(state: TrainState, axis: Axis) -> Keys:
    """Derive the keys of the step that the state is at.

    Those of evaluations differ by device.
    """
    key = jax.random.fold_in(state.rng, state.step)
    filter, alpha, loss, specific = jax.random.split(key, 4)
    features, method = (jax.random.fold_in(key, i) for i in (4, 5))
    own = [axis.fold(k) for k in (loss, specific, features, method)]
    return Keys(filter, alpha, *own)


class Inner(NamedTuple):
    """Rows for one evaluation of the inner loss."""

    batch: Batch
    weights: Weights
    """`[b]`, summing to 1 over all devices (in the mean over draws, if the filter weighs its rows); a function of the rows'
    losses where those give the logits."""
    rng: Array
    features: Callable[[Array], Features]
    """The rows' losses at θ -> what the scorer knows about the rows."""


class Chosen(NamedTuple):
    """The rows of a step, and the scores that they were chosen or weighted by."""

    inner: Inner
    """The rows of the θ-update."""
    positions: Array
    """int32 `[b]`: where they are in the big batch."""
    scores: Callable[[Array], picking.Scores]
    """The losses of the rows of the θ-update, at θ -> the scores of the big batch."""
    outer: Callable[[], Inner]
    """The rows of the α-gradient: those of the θ-update, or others from the same big batch."""


@dataclass(frozen=True, eq=False)
class Chooser:
    """Turns big batches into the rows of a step."""

    evaluations: Evaluations
    scorer: Scorer
    filter: filters.Filter
    options: StepOptions
    uses_weights: bool

    def choose(self, state: TrainState, big_batch: Batch, keys: Keys) -> Chosen:
        """Choose the rows of a step."""
        if self.options.mode == "dense":
            self._check_dense(big_batch)
            if self.uses_weights and self.scorer.loss is self.evaluations.loss:
                return self._weighted_by_losses(state, big_batch, keys.loss)
        features: Features = ()
        if self.uses_weights:
            features = self.evaluations.features(self.scorer.features, state, big_batch, keys.features)
        scores = self._score(state, big_batch, features)
        rows, weights = self._rows(keys.filter, scores, big_batch, features)
        inner = Inner(rows.batch, weights, keys.loss, lambda _: rows.features)

        def outer() -> Inner:
            return inner if self.options.shares_rows else self._others(state, big_batch, scores, features, keys.alpha)

        return Chosen(inner, rows.positions, lambda _: scores, outer)

    def _others(
        self, state: TrainState, big_batch: Batch, scores: picking.Scores, features: Features, key: Array
    ) -> Inner:
        """Choose rows of the α-gradient that are not those of the θ-update."""
        options, axis = self.options, self.options.axis
        count = options.alpha_batch_size or options.batch_size
        pick_key, loss_key = jax.random.split(key)
        rule = self.filter
        if options.alpha_batch == "uniform":
            rule = filters.uniform(scope=self.filter.scope, shards=self.filter.shards)
        rows = self._picked(pick_key, scores, big_batch, features, count, rule)
        if options.alpha_batch == "filtered":
            weights = axis.spread(jnp.full((count // axis.size,), 1.0 / count))
        else:
            logits = self.scorer.logits(state.weight_params, rows.batch, rows.features) / scores.temperature
            weights = estimators.softmax(filters.usable(logits), axis)
        return Inner(rows.batch, weights, axis.fold(loss_key), lambda _: rows.features)

    def _weighted_by_losses(self, state: TrainState, big_batch: Batch, key: Array) -> Chosen:
        """Weigh all rows by the θ-update's own losses in dense mode: the weights are known once those are."""

        def scores(losses: Array) -> picking.Scores:
            return self._score(state, big_batch, as_features(losses))

        def weights(losses: Array) -> Array:
            return estimators.softmax(scores(losses).local, self.options.axis)

        positions = picking.everything(big_batch, self.filter, self.options.axis).positions
        inner = Inner(big_batch, weights, key, as_features)
        return Chosen(inner, positions, scores, lambda: inner)

    def _score(self, state: TrainState, big_batch: Batch, features: Features) -> picking.Scores:
        axis = self.options.axis
        if self.uses_weights:

            def logits(weight_params: Params, batch: Batch) -> Array:
                return self.scorer.logits(weight_params, batch, features)

            return picking.score(logits, state.weight_params, big_batch, self.filter, axis)
        flat = jnp.zeros(trees.num_rows(big_batch))
        everyone = axis.size if self.filter.scope == "global" else 1
        return picking.Scores(flat, jnp.tile(flat, everyone), jnp.ones(()))

    def _check_dense(self, big_batch: Batch) -> None:
        rows = trees.num_rows(big_batch) * self.options.axis.size
        if rows != self.options.batch_size:
            raise UserError(
                f"In dense mode the big batch is the batch, but it has {rows} rows and "
                f"batch_size={self.options.batch_size}: make them equal."
            )

    def _rows(
        self, key: Array, scores: picking.Scores, big_batch: Batch, features: Features
    ) -> tuple[picking.Rows, Array]:
        """Find the rows of the θ-update and their weights: see `Inner.weights`."""
        options, axis = self.options, self.options.axis
        even = jnp.full((options.batch_size // axis.size,), 1.0 / options.batch_size)
        if options.mode == "dense" and self.uses_weights:
            rows = picking.everything(big_batch, self.filter, axis, features)
            return rows, estimators.softmax(scores.local, axis)
        if trees.num_rows(big_batch) * axis.size == options.batch_size and not self.uses_weights:
            rows = picking.everything(big_batch, self.filter, axis)  # nothing to choose
            return rows, axis.spread(even)
        rows = self._picked(key, scores, big_batch, features, options.batch_size, self.filter)
        if self.filter.weigh is None:
            return rows, axis.spread(even)
        return rows, spread_rows(even * self.filter.weigh(scores.pool, rows.positions), self.evaluations.mesh)

    def _picked(
        self,
        key: Array,
        scores: picking.Scores,
        big_batch: Batch,
        features: Features,
        count: int,
        rule: filters.Filter,
    ) -> picking.Rows:
        rows = picking.pick(key, scores, big_batch, count, rule, self.options.axis, features)
        batch, features = spread_rows((rows.batch, rows.features), self.evaluations.mesh)
        return rows._replace(batch=batch, features=features)
