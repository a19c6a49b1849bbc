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
    left: Array | None = None
    """bool `[b]`: the rows that are not used up, which alone have a weight; None: all."""


class Choice(NamedTuple):
    """The rows of a step, before they are there in full."""

    positions: Array
    """int32 `[b]`: where the rows of the θ-update are in the big batch. On an α-step that does not share them, those of the
    α-gradient follow."""
    scores: picking.Scores
    """Of the big batch."""
    features: Features
    """What the scorer knows about the rows at the positions."""


class _Draw(NamedTuple):
    """What the filter is asked for."""

    key: Array
    rows: int
    rule: filters.Filter


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
        features = self._features(state, big_batch, keys)
        scores = self._score(state, big_batch, features)
        if self._takes_all(scores):
            rows = picking.everything(big_batch, self.filter, self.options.axis, features)
        else:
            rows = self._picked(self._for_theta(keys), scores, big_batch, features)
        return self._chosen(
            state, keys, scores, rows, lambda: self._picked(self._for_alpha(keys), scores, big_batch, features)
        )

    def choose_ahead(self, state: TrainState, small: Batch, learns: bool) -> Choice:
        """Choose the rows of a step by a part of the arrays of the big batch.

        Args:
          state: before the step.
          small: the big batch, of which the arrays that the scorer reads are there.
          learns: whether the step has an α-gradient.

        Raises:
          UserError: the scorer reads an array that is not there; for dense mode and a mapped axis.
        """
        self._check_two_stages()
        keys = keys_of(state, self.options.axis)
        try:
            features = self._features(state, small, keys)
            scores = self._score(state, small, features)
        except KeyError as error:
            there = ", ".join(map(str, small)) if isinstance(small, dict) else type(small).__name__
            raise UserError(
                f"The weights of rows need the array {error.args[0]!r}, which the small big batch has not (it has: {there}): add "
                "it, or load all rows in full and take the step in one stage."
            ) from error

        def chosen(draw: _Draw) -> Array:
            return picking.choose_positions(draw.key, scores, small, draw.rows, draw.rule)

        positions = jnp.arange(trees.num_rows(small)) if self._takes_all(scores) else chosen(self._for_theta(keys))
        if learns and not self.options.shares_rows:
            positions = jnp.concatenate([positions, chosen(self._for_alpha(keys))])
        return Choice(positions, scores, trees.take(features, positions))

    def chosen_before(self, state: TrainState, choice: Choice, rows: Batch) -> Chosen:
        """Go on from a choice, with its rows.

        Raises:
          UserError: the rows are not as many as were chosen.
        """
        count, split = choice.positions.shape[0], self.options.batch_size
        if trees.num_rows(rows) != count:
            raise UserError(
                f"step_on got {trees.num_rows(rows)} rows, but {count} were chosen: give those at choice.positions, in order."
            )

        keys = keys_of(state, self.options.axis)

        def part(places: slice) -> picking.Rows:
            found = trees.map_rows(lambda x: x[places], (rows, choice.features))
            batch, features = spread_rows(found, self.evaluations.mesh)
            return picking.Rows(batch, choice.positions[places], features)

        return self._chosen(state, keys, choice.scores, part(slice(split)), lambda: part(slice(split, None)))

    def _chosen(
        self,
        state: TrainState,
        keys: Keys,
        scores: picking.Scores,
        rows: picking.Rows,
        others: Callable[[], picking.Rows],
    ) -> Chosen:
        """Weigh the rows of the θ-update, and those of the α-gradient where they are others."""
        left = self._left(state, rows.batch)
        inner = Inner(rows.batch, self._weights(scores, rows, left), keys.loss, lambda _: rows.features, left)

        def outer() -> Inner:
            return inner if self.options.shares_rows else self._outer(state, keys, scores, others())

        return Chosen(inner, rows.positions, lambda _: scores, outer)

    def _outer(self, state: TrainState, keys: Keys, scores: picking.Scores, rows: picking.Rows) -> Inner:
        """Weigh rows of the α-gradient that are not those of the θ-update."""
        axis, (_, loss_key) = self.options.axis, jax.random.split(keys.alpha)
        if self.options.alpha_batch == "filtered":
            left = self._left(state, rows.batch)
            weights = self._even(self._for_alpha(keys).rows, left)
        else:
            left, logits = None, self.scorer.logits(state.weight_params, rows.batch, rows.features)
            weights = estimators.softmax(filters.usable(logits / scores.temperature), axis)
        return Inner(rows.batch, weights, axis.fold(loss_key), lambda _: rows.features, left)

    def _for_theta(self, keys: Keys) -> _Draw:
        return _Draw(keys.filter, self.options.batch_size, self.filter)

    def _for_alpha(self, keys: Keys) -> _Draw:
        """Ask for rows of the α-gradient that are not those of the θ-update."""
        rule, options = self.filter, self.options
        if options.alpha_batch == "uniform":
            rule = filters.uniform(scope=rule.scope, shards=rule.shards)
        return _Draw(jax.random.split(keys.alpha)[0], options.alpha_batch_size or options.batch_size, rule)

    def _features(self, state: TrainState, big_batch: Batch, keys: Keys) -> Features:
        if not self.uses_weights:
            return ()
        return self.evaluations.features(self.scorer.features, state, big_batch, keys.features)

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

            left = self._left(state, big_batch)
            return picking.score(logits, state.weight_params, big_batch, self.filter, axis, left)
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

    def _check_two_stages(self) -> None:
        options = self.options
        if options.mode == "dense":
            raise UserError(
                'mode="dense" trains on all rows of the big batch, so that none need not be loaded: take the step in one stage, '
                'or choose mode="sparse".'
            )
        if options.axis.name is not None:
            raise UserError(
                f"axis_name={options.axis.name!r} gives each device its own rows, which are not loaded by their positions: build "
                "the step with mesh= instead, or take it in one stage."
            )

    def _takes_all(self, scores: picking.Scores) -> bool:
        """Whether there is nothing to choose: dense mode, or a big batch that is no bigger, without weights."""
        if self.uses_weights:
            return self.options.mode == "dense"
        return scores.local.shape[0] * self.options.axis.size == self.options.batch_size

    def _left(self, state: TrainState, batch: Batch) -> Array | None:
        """Which rows of a batch may still be trained on; None: all."""
        cap = self.options.max_uses
        return None if cap is None else cap.left(state.uses, batch)

    def _even(self, count: int, left: Array | None) -> Array:
        """Weights of rows that count alike, `count` over all devices, those that are used up left out."""
        axis = self.options.axis
        if left is None:
            return axis.spread(jnp.full((count // axis.size,), 1.0 / count))
        return left / jnp.maximum(estimators.total(left, axis), 1).astype(jnp.float32)

    def _weights(self, scores: picking.Scores, rows: picking.Rows, left: Array | None) -> Array:
        """Weigh the rows of the θ-update: see `Inner.weights`."""
        options, axis = self.options, self.options.axis
        if options.mode == "dense" and self.uses_weights:
            return estimators.softmax(scores.local, axis)
        if self.filter.weigh is None or self._takes_all(scores):
            return self._even(options.batch_size, left)
        even = jnp.full((options.batch_size // axis.size,), 1.0 / options.batch_size)
        return spread_rows(even * self.filter.weigh(scores.pool, rows.positions), self.evaluations.mesh)

    def _picked(self, draw: _Draw, scores: picking.Scores, big_batch: Batch, features: Features) -> picking.Rows:
        rows = picking.pick(draw.key, scores, big_batch, draw.rows, draw.rule, self.options.axis, features)
        batch, features = spread_rows((rows.batch, rows.features), self.evaluations.mesh)
        return rows._replace(batch=batch, features=features)
