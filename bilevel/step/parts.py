"""The pure functions that train steps are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.methods.base import Method, MethodFn, MethodUpdate
from bilevel.selection import filters
from bilevel.selection.metrics import weight_metrics
from bilevel.selection.picking import Scores
from bilevel.state import TrainState
from bilevel.step import estimators
from bilevel.step.checks import asked_for, check_start, is_sound
from bilevel.step.choosing import Choice, Chooser, Chosen, Inner, keys_of
from bilevel.step.kinds import Stages, TwoStage, on_due
from bilevel.step.options import StepOptions
from bilevel.step.problem import Evaluations
from bilevel.types import NOT_COMPUTED, Array, Batch, LossAux, Metrics, ModelState, Params, UserError

_StepOnChosen: TypeAlias = Callable[[TrainState, Chosen, Batch], tuple[TrainState, Metrics]]
_OF_ALPHA_STEPS = ("specific_loss", "weight_gradient_norm", "alignment_rms", "alpha_skipped")


class Moved(NamedTuple):
    """What one step changes, from the branch that computed it."""

    losses: Array
    rows: Metrics
    """What the loss says about each row of the θ-update besides its loss: arrays `[b]`."""
    model_state: ModelState
    params: Params
    opt_state: Any
    weight_params: Params
    weight_opt_state: Any
    method_state: Any
    metrics: Metrics
    asked: Metrics
    """The per-example metrics that were asked for, `[b, …]`."""
    gradient: Params
    """What the optimizer of θ was given."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a step and the pure functions over them; `make_step` says what they do."""

    evaluations: Evaluations
    chooser: Chooser
    optimizer: optax.GradientTransformation
    weight_optimizer: optax.GradientTransformation
    method: Method
    options: StepOptions

    def init(
        self, rng: Array, params: Params, weight_params: Params | None = None, model_state: ModelState | None = None
    ) -> TrainState:
        """See `TrainStep.init`."""
        check_start(self.optimizer, self.weight_optimizer, self.method, self.options, params, weight_params)
        subset = self.evaluations.subset(params)
        given = (params, {} if weight_params is None else weight_params, rng)
        # Copies, so that donating the state takes no array away from the caller.
        params, alpha, rng = jax.tree.map(jnp.copy, given)
        model_state = jax.tree.map(jnp.copy, {} if model_state is None else model_state)
        ema = None if self.options.ema_decay is None else trees.wide((params, model_state))
        states = (
            self.optimizer.init(params),
            self.weight_optimizer.init(alpha),
            self.method.init(subset.restrict(params)),
            ema,
        )
        # Copies again: optimizers may keep the very arrays that they were given, and no array can be donated twice.
        opt_state, weight_opt_state, method_state, ema = (jax.tree.map(jnp.copy, part) for part in states)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            weight_params=alpha,
            weight_opt_state=weight_opt_state,
            method_state=method_state,
            ema=ema,
            rng=rng,
            uses=None if self.options.max_uses is None else self.options.max_uses.init(),
        )

    def step(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        """See `TrainStep.step`."""
        options, arguments = self.options, (state, big_batch, specific_batch)

        def between(*arguments: Any) -> tuple[TrainState, Metrics]:
            if options.period == options.update_every:
                return self.plain(*arguments)
            return on_due(state.step, options.update_every, self.reuse, self.plain, arguments)

        return on_due(state.step, options.period, self.learn, between, arguments)

    def plain(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        """See `TrainStep.plain`."""
        return self._plain_on(state, self._choose(state, big_batch), specific_batch)

    def weighted(self, state: TrainState, batch: Batch, weights: Array) -> tuple[TrainState, Metrics, Params]:
        """See `TrainStep.weighted`."""
        key = keys_of(state, self.options.axis).loss
        moved = self._plain(state, Inner(batch, weights, key, lambda _: ()))
        rows = {**moved.rows, "loss": moved.losses}
        means = {f"generic_{name}": estimators.total(weights * x, self.options.axis) for name, x in rows.items()}
        metrics = {name: x.astype(jnp.float32) for name, x in means.items()}
        return self._next(state, moved), {**metrics, **moved.asked}, moved.gradient

    def learn(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        """See `TrainStep.learn`."""
        return self._learn_on(state, self._choose(state, big_batch), specific_batch)

    def reuse(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        """See `TrainStep.reuse`."""
        return self._reuse_on(state, self._choose(state, big_batch), specific_batch)

    def stages(self) -> Stages:
        """Make each kind of step in two stages."""
        plain = self._stages_of(self._plain_on, learns=False)
        if self.method.update is None or self.method.chooses_weights:  # which has no stages: it needs dense mode
            return Stages(plain, plain, plain)
        learn = self._stages_of(self._learn_on, learns=True)
        reuses = self.options.period > self.options.update_every
        return Stages(plain, learn, self._stages_of(self._reuse_on, learns=True) if reuses else learn)

    def _stages_of(self, step: _StepOnChosen, *, learns: bool) -> TwoStage:
        def choose(state: TrainState, small_big_batch: Batch) -> Choice:
            return self.chooser.choose_ahead(state, small_big_batch, learns)

        def step_on(
            state: TrainState, rows: Batch, specific_batch: Batch, choice: Choice
        ) -> tuple[TrainState, Metrics]:
            return step(state, self.chooser.chosen_before(state, choice, rows), specific_batch)

        return TwoStage(choose, step_on)

    def _choose(self, state: TrainState, big_batch: Batch) -> Chosen:
        return self.chooser.choose(state, big_batch, keys_of(state, self.options.axis))

    def _plain_on(self, state: TrainState, chosen: Chosen, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        return self._finish(state, chosen, self._plain(state, chosen.inner))

    def _learn_on(self, state: TrainState, chosen: Chosen, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.update is not None
        return self._alpha_step(self.method.update, state, chosen, specific_batch)

    def _reuse_on(self, state: TrainState, chosen: Chosen, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.reuse is not None
        return self._alpha_step(self.method.reuse, state, chosen, specific_batch)

    def _alpha_step(
        self, method: MethodFn, state: TrainState, chosen: Chosen, specific_batch: Batch
    ) -> tuple[TrainState, Metrics]:
        keys = keys_of(state, self.options.axis)
        outer = chosen.outer()
        losses = self.evaluations.rows(state, outer.batch, outer.rng)
        problem = self.evaluations.problem(state, losses, outer.weights, specific_batch, keys.specific, keys.method)
        update = method(problem, state.method_state)
        moved = self._learn(state, chosen, outer, update)
        return self._finish(state, chosen, moved, update.weights)

    def _finish(
        self, state: TrainState, chosen: Chosen, moved: Moved, weights: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        axis, scores = self.options.axis, chosen.scores(moved.losses)
        rows, left, state_after = {**moved.rows, "loss": moved.losses}, chosen.inner.left, self._next(state, moved)
        means = {f"generic_{name}": self._mean(x, left) for name, x in rows.items()}
        metrics = {**means, **moved.metrics, "temperature": scores.temperature}
        if weights is None:
            metrics |= weight_metrics(axis.gather(scores.pool) if self._local else scores.pool)
        else:
            metrics |= weight_metrics(axis.gather(jnp.log(weights)))
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        if weights is None and self.options.mode == "dense" and self.method.uses_weights:
            weights = estimators.softmax(scores.local, axis)
        # Positions in the big batch of all devices.
        positions = chosen.positions + axis.index * scores.local.shape[0] if self._local else chosen.positions
        vectors = {"selected": positions} if weights is None else {"selected": positions, "weights": weights}
        if scores.bad is not None:
            metrics["bad_logits"] = scores.bad.number.astype(jnp.float32)
            vectors["bad_logit_row"] = scores.bad.row
        if isinstance(batch := chosen.inner.batch, dict) and "id" in batch:
            vectors["ids"] = batch["id"] if left is None else jnp.where(left, batch["id"], -1)
        if left is not None:
            assert self.options.max_uses is not None
            assert not callable(chosen.inner.weights)
            metrics["rows_left_out"] = estimators.total(~left, axis).astype(jnp.float32)
            vectors["weights"] = chosen.inner.weights
            uses = self.options.max_uses.counted(state.uses, batch, left, axis)
            state_after = dataclasses.replace(state_after, uses=uses)
        taken = moved.asked.keys() & {**metrics, **vectors}.keys()
        if taken:
            raise UserError(
                f"row_metrics asks for {min(taken)!r}, and the step has a metric of that name: rename it in the loss's LossAux."
            )
        return state_after, {**metrics, **vectors, **moved.asked}

    def _mean(self, x: Array, left: Array | None) -> Array:
        """The mean over the rows of the θ-update that were trained on; NOT_COMPUTED without any."""
        if left is None:
            return estimators.total(x, self.options.axis) / self.options.batch_size
        count = estimators.total(left, self.options.axis)
        mean = estimators.total(jnp.where(left, x, 0.0), self.options.axis) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, NOT_COMPUTED)

    @property
    def _local(self) -> bool:
        """Whether each device chooses among its own rows."""
        return self.chooser.filter.scope == "local"

    def _plain(self, state: TrainState, inner: Inner) -> Moved:
        """The θ-update alone: what every training step costs."""
        rows = self.evaluations.rows(state, inner.batch, inner.rng)
        values, aux, gradient = rows.pulled_back(self.options.axis.spread(state.params), inner.weights)
        metrics = {name: jnp.full((), NOT_COMPUTED) for name in _OF_ALPHA_STEPS}
        return self._move(state, values, aux, self.options.axis.sum(gradient), metrics)

    def _learn(self, state: TrainState, chosen: Chosen, outer: Inner, update: MethodUpdate) -> Moved:
        """The θ-update and the α-update, both from the same θ and α."""
        metrics = {name: jnp.full((), NOT_COMPUTED) for name in _OF_ALPHA_STEPS}
        before = state.weight_params, state.weight_opt_state, state.method_state
        weights, opt_state, _ = before
        if update.specific_loss is not None:
            metrics["specific_loss"] = update.specific_loss
        if update.alignments is not None:
            squares = estimators.total(trees.widen(update.alignments) ** 2, self.options.axis)
            metrics["alignment_rms"] = jnp.sqrt(squares / (update.alignments.shape[0] * self.options.axis.size))
        if not self.method.chooses_weights:
            gradient = self._weight_gradient(state, outer, update, chosen.scores(update.losses))
            metrics["weight_gradient_norm"] = trees.norm(gradient)
            updates, opt_state = self.weight_optimizer.update(gradient, opt_state, weights)
            weights = optax.apply_updates(weights, updates)
        found = weights, opt_state, update.state
        sound = is_sound(update, found, before, self.options.axis)
        metrics["alpha_skipped"] = 1.0 - sound.astype(jnp.float32)
        weights, opt_state, method_state = trees.choose(sound, found, before)
        if self.options.shares_rows:
            moved = self._move(state, update.losses, update.aux, update.gradient, metrics)
        else:
            later = dataclasses.replace(state, params=trees.after(state.params, update.gradient))
            moved = self._plain(later, chosen.inner)._replace(metrics=metrics)
        return moved._replace(weight_params=weights, weight_opt_state=opt_state, method_state=method_state)

    def _weight_gradient(self, state: TrainState, rows: Inner, update: MethodUpdate, scores: Scores) -> Params:
        """Σ a_i ∇_α w_i by one pass back through the weighting network."""
        assert update.alignments is not None
        options, axis = self.options, self.options.axis
        temperature = scores.temperature
        features = rows.features(update.losses)
        logits, pullback = jax.vjp(
            lambda p: self.chooser.scorer.logits(p, rows.batch, features), axis.spread(state.weight_params)
        )
        known, alignments = filters.usable(logits), trees.widen(update.alignments)
        if rows.left is not None:
            known, alignments = estimators.left_out(known, alignments, rows.left, axis)
        cotangents = estimators.logit_cotangents(
            alignments,
            known / temperature,
            options.estimator,
            num_rows=logits.shape[0] * axis.size,
            normalize=options.normalize_alignments,
            pull=estimators.entropy_pull(options.entropy_bonus, known, scores.local, temperature, axis),
            shift=estimators.shift_pull(options.shift_pull, known, temperature, options.estimator, axis),
            axis=axis,
        )
        if rows.left is not None:
            cotangents = jnp.where(rows.left, cotangents, 0.0)
        (gradient,) = pullback((cotangents / temperature).astype(logits.dtype))
        return axis.sum(gradient)

    def _move(self, state: TrainState, losses: Array, aux: LossAux, gradient: Params, metrics: Metrics) -> Moved:
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return Moved(
            losses,
            {name: trees.widen(x) for name, x in aux.metrics.items() if x.ndim == 1},
            trees.as_before(self.options.axis.mean(aux.model_state), state.model_state),
            optax.apply_updates(state.params, updates),
            opt_state,
            state.weight_params,
            state.weight_opt_state,
            state.method_state,
            metrics,
            asked_for(self.options.row_metrics, aux),
            gradient,
        )

    def _next(self, state: TrainState, moved: Moved) -> TrainState:
        decay, ema = self.options.ema_decay, state.ema
        if decay is not None:
            ema = trees.average((moved.params, moved.model_state), ema, decay)
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=moved.params,
            model_state=moved.model_state,
            opt_state=moved.opt_state,
            weight_params=moved.weight_params,
            weight_opt_state=moved.weight_opt_state,
            method_state=moved.method_state,
            ema=ema,
        )
