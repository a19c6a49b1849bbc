"""The rows that a step works on: scored, filtered, and given their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.rows import Weights
from bilevel.devices.collectives import axis_size, fold_index, spread, spread_rows
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


def keys_of(state: TrainState, axis_name: str | None) -> Keys:
    """The keys of the step that the state is at; those of evaluations differ by device."""
    key = jax.random.fold_in(state.rng, state.step)
    filter, alpha, loss, specific = jax.random.split(key, 4)
    features, method = (jax.random.fold_in(key, i) for i in (4, 5))
    own = [fold_index(k, axis_name) for k in (loss, specific, features, method)]
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
    """The rows of the θ-update, and the scores that they were chosen or weighted by."""

    inner: Inner
    positions: Array
    """int32 `[b]`, in the big batch."""
    scores: picking.Scores | None
    """Of the big batch; None where the θ-update's own losses give them."""
    features: Features
    """Of the big batch, for other choices from it; `()` where the losses give the logits."""


@dataclass(frozen=True, eq=False)
class Chooser:
    """Turns big batches into the rows of a step."""

    evaluations: Evaluations
    scorer: Scorer
    filter: filters.Filter
    options: StepOptions
    uses_weights: bool

    def choose(self, state: TrainState, big_batch: Batch, keys: Keys) -> Chosen:
        """The rows of the θ-update."""
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
        return Chosen(inner, rows.positions, scores, features)

    def scores(self, state: TrainState, big_batch: Batch, chosen: Chosen, losses: Array) -> picking.Scores:
        """The scores of the big batch, given the losses of the rows of the θ-update at θ."""
        return self._score(state, big_batch, as_features(losses)) if chosen.scores is None else chosen.scores

    def for_alpha(self, state: TrainState, big_batch: Batch, chosen: Chosen, key: Array) -> Inner:
        """Rows of the α-gradient when they are not those of the θ-update."""
        options, axis, scores = self.options, self.options.axis_name, chosen.scores
        assert scores is not None
        count = options.alpha_batch_size or options.batch_size
        pick_key, loss_key = jax.random.split(key)
        rule = self.filter
        if options.alpha_batch == "uniform":
            rule = filters.uniform(scope=self.filter.scope, shards=self.filter.shards)
        rows = self._picked(pick_key, scores, big_batch, chosen.features, count, rule)
        if options.alpha_batch == "filtered":
            weights = spread(jnp.full((count // axis_size(axis),), 1.0 / count), axis)
        else:
            logits = self.scorer.logits(state.weight_params, rows.batch, rows.features) / scores.temperature
            weights = estimators.softmax(logits, axis)
        return Inner(rows.batch, weights, fold_index(loss_key, axis), lambda _: rows.features)

    def _weighted_by_losses(self, state: TrainState, big_batch: Batch, key: Array) -> Chosen:
        """Dense mode with logits of the θ-update's own losses: weights that are known once those are."""

        def weights(losses: Array) -> Array:
            scores = self._score(state, big_batch, as_features(losses))
            return estimators.softmax(scores.local, self.options.axis_name)

        positions = picking.everything(big_batch, self.filter, self.options.axis_name).positions
        return Chosen(Inner(big_batch, weights, key, as_features), positions, None, ())

    def _score(self, state: TrainState, big_batch: Batch, features: Features) -> picking.Scores:
        axis = self.options.axis_name
        if self.uses_weights:

            def logits(weight_params: Params, batch: Batch) -> Array:
                return self.scorer.logits(weight_params, batch, features)

            return picking.score(logits, state.weight_params, big_batch, self.filter, axis)
        flat = jnp.zeros(trees.num_rows(big_batch))
        everyone = axis_size(axis) if self.filter.scope == "global" else 1
        return picking.Scores(flat, jnp.tile(flat, everyone), jnp.ones(()))

    def _check_dense(self, big_batch: Batch) -> None:
        rows = trees.num_rows(big_batch) * axis_size(self.options.axis_name)
        if rows != self.options.batch_size:
            raise UserError(
                f"In dense mode the big batch is the batch, but it has {rows} rows and "
                f"batch_size={self.options.batch_size}: make them equal."
            )

    def _rows(
        self, key: Array, scores: picking.Scores, big_batch: Batch, features: Features
    ) -> tuple[picking.Rows, Array]:
        """The rows of the θ-update and their weights: see `Inner.weights`."""
        options, devices = self.options, axis_size(self.options.axis_name)
        even = jnp.full((options.batch_size // devices,), 1.0 / options.batch_size)
        if options.mode == "dense" and self.uses_weights:
            rows = picking.everything(big_batch, self.filter, options.axis_name, features)
            return rows, estimators.softmax(scores.local, options.axis_name)
        if trees.num_rows(big_batch) * devices == options.batch_size and not self.uses_weights:
            rows = picking.everything(big_batch, self.filter, options.axis_name)  # nothing to choose
            return rows, spread(even, options.axis_name)
        rows = self._picked(key, scores, big_batch, features, options.batch_size, self.filter)
        if self.filter.weigh is None:
            return rows, spread(even, options.axis_name)
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
        rows = picking.pick(key, scores, big_batch, count, rule, self.options.axis_name, features)
        batch, features = spread_rows((rows.batch, rows.features), self.evaluations.mesh)
        return rows._replace(batch=batch, features=features)
