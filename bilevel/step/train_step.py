"""The train step: score, filter, differentiate, update θ and, at times, α.

    train = make_step(loss, weighting, optimizer, weight_optimizer, soba(optax.sgd(0.01)), batch_size=16)
    state = train.init(rng, params, weight_params)
    step = jax.jit(train.step, donate_argnums=0)
    state, metrics = step(state, big_batch, specific_batch)

The step is a pure function that the user jits, shards or scans. All randomness comes from `state.rng` and `state.step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.derivatives.linearization import Derivatives, Finite
from bilevel.devices.axis import Axis
from bilevel.methods.base import Method, MethodFn, MethodUpdate
from bilevel.selection import filters, scorers
from bilevel.selection.metrics import weight_metrics
from bilevel.selection.picking import Scores
from bilevel.selection.scorers import Scorer
from bilevel.state import TrainState
from bilevel.step import estimators
from bilevel.step.checks import asked_for, check_start, is_sound
from bilevel.step.choosing import Chooser, Chosen, Inner, keys_of
from bilevel.step.estimators import Estimator
from bilevel.step.kinds import StepFn as StepFn
from bilevel.step.kinds import TrainStep as TrainStep
from bilevel.step.kinds import on_due
from bilevel.step.options import AlphaBatch, Mode, StepOptions, check_parts, check_together
from bilevel.step.problem import Evaluations
from bilevel.types import NOT_COMPUTED, Array, Batch, LogitFn, LossAux, LossFn, Metrics, ModelState, Params, UserError


def make_step(
    loss: LossFn,
    weighting: LogitFn | Scorer | None,
    optimizer: optax.GradientTransformation,
    weight_optimizer: optax.GradientTransformation | None,
    method: Method,
    *,
    batch_size: int,
    filter: filters.Filter | None = None,
    derivatives: Derivatives | None = None,
    specific_loss: LossFn | None = None,
    param_filter: Callable[[str], bool] | None = None,
    mode: Mode = "sparse",
    estimator: Estimator = "softmax",
    alpha_batch: AlphaBatch = "filtered",
    alpha_batch_size: int | None = None,
    update_every: int | None = None,
    probe_every: int | None = None,
    normalize_alignments: bool = False,
    entropy_bonus: float = 0.0,
    ema_decay: float | None = None,
    micro_batches: int = 1,
    row_metrics: tuple[str, ...] = (),
    mesh: jax.sharding.Mesh | None = None,
    gather: Callable[[str], bool] | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """Build the train step of one method.

    Sparse mode (Grangier et al., algorithm 1): the weighting network scores the B rows of the big batch without a gradient,
    the filter keeps b of them, θ is updated with uniform weights on those. Dense mode (Wang et al., algorithm 1): the big
    batch is the batch, and the softmax of its logits weighs the rows in the θ-update.

    Args:
      loss: per-example losses; see `bilevel.types.LossFn`.
      weighting: logits of a batch: a plain function, see `bilevel.types.LogitFn`, or one that sees the main model, see
        `bilevel.selection.scorers.Scorer`. None for a method that does not use it (`uniform`, `learning_to_reweight`).
      optimizer: optax transformation of θ.
      weight_optimizer: optax transformation of α. None if α does not change.
      method: what learns α, from `bilevel.methods`.
      batch_size: b, rows in a θ-update, over all devices.
      filter: how b of B rows are picked; `filters.gumbel_top_k()` by default. Unused in dense mode but for its temperature.
      derivatives: `bilevel.Finite()` (the default: cheapest) or `bilevel.Forward()` (exact).
      specific_loss: the loss on specific rows, if it differs from `loss`.
      param_filter: path -> whether the probe covers that parameter; None covers all. Paths look like "block_1/mlp/kernel". Rules
        of `jax.custom_vjp` in the loss must then take the arrays they use as arguments (see `bilevel.derivatives.splitting`).
      mode: "sparse" or "dense".
      estimator: "softmax", "score" or "uniform"; see `bilevel.step.estimators`.
      alpha_batch: where the rows of the α-gradient come from: the filter ("filtered", in which case they are the rows of the
        θ-update unless `alpha_batch_size` says otherwise) or a uniform draw from the big batch.
      alpha_batch_size: rows in the α-gradient; None takes b.
      update_every: α changes on steps 0, k, 2k, …; the others cost no more than scoring. None takes 4, or 1 for a method that
        chooses the weights of every θ-update (`learning_to_reweight`).
      probe_every: the specific batch is evaluated, and the method's state changes, on these steps only; the α-steps between them
        use the specific gradient that the state remembers, for one forward pass with `Finite()`. A multiple of `update_every`;
        None: on every α-step. Needs a method with `reuse`: `soba`, `penalty`, or `dds` and `anograd` with `average_specific`.
      normalize_alignments: scale the alignments of each α-step to root mean square 1.
      entropy_bonus: λ ≥ 0. The α-gradient lowers Σ w_i a_i − λ τ H(w), with H the entropy of the weights and τ the filter's
        temperature: λ (s_i − s̄) is added to each alignment, after scaling, s̄ the mean logit of the big batch. Without it logits
        may grow without end: alignments of noise alone concentrate the weights. With it they rest where w ∝ exp(−E[a]/(λ τ)).
        Costs nothing.
      ema_decay: keep an exponential moving average of (params, model_state) with this decay, in at least float32.
      micro_batches: evaluate the b rows (and the specific batch) in this many equal parts, one after the other: the same update
        to rounding with the activations of one part in memory. See `bilevel.derivatives.rows.RowLosses`.
      row_metrics: names of the per-example metrics of `loss` that the step returns for the rows of the θ-update, as its own
        evaluation gave them.
      mesh: the devices that rows are spread over under plain `jit`: those that the filter picks are spread over it too, and split
        parameters (`bilevel.devices.sharding.split_state`) are gathered where they are used. With None the
        compiler decides, and tends to compute all rows on every device.
      gather: path -> whether the step itself gathers that split parameter, whole and before the loss. The loss gathers the others
        where it uses them, and never holds all of them at once (`bilevel.nn.transformer.Transformer(mesh=…)` does so, block by
        block). None: the step gathers all.
      axis_name: the mapped axis of `pmap` or `shard_map` that the rows are spread over. Leave None under plain `jit`, also
        with sharded arrays. The state and the scalar metrics are the same on every device, but only of the state can
        `shard_map` prove it: give it check_vma=False and out_specs P() for both. The metrics with rows (`selected`, …) are each
        device's share, out_specs P(axis_name).

    Returns:
      A `TrainStep`: `init`, `step`, … The metrics are float32 scalars: generic_loss (mean of the rows of the θ-update; so are
      generic_NAME, for each metric NAME that the loss gives as one number a row, but for one called "loss"), temperature,
      effective_sample_size, weight_entropy and largest_weight (over the big batch), bad_logits (rows of it whose logit is NaN
      or +∞, which are selected last; omitted where no row is scored); and of α-steps specific_loss, weight_gradient_norm,
      alignment_rms, and alpha_skipped (1 if α and the method's state stayed, as the specific loss, its gradient, an alignment
      or what would have become of α was not finite; else 0). What a step does not compute is −∞ (`types.NOT_COMPUTED`): NaN is
      only what went wrong. Others are int32: `bad_logit_row`, the `id` of a row whose logit is bad (its position, in big batches
      without ids), or −1; and `selected`, `[b]`: the positions in the big batch (with `axis_name`: in that of all devices) of
      the rows of the θ-update. If the big batch is a dict with `id`, int32 `[B]`, there is also `ids`, `[b]`: the ids of these
      rows. Where they have different weights (in dense mode, and by a method that chooses them itself) there is also
      `weights`, float32 `[b]`. Those named by `row_metrics` follow, `[b, …]`.

    Raises:
      UserError: for options that do not go together, now; by `init`, for parameters that are not real numbers and an optimizer
        whose update needs more than a gradient; for shapes that do not fit, when the step is traced. `init` warns of an
        optimizer that a method which looks ahead (`dds`) learns nothing through.
    """
    check_parts(method, filter, derivatives)
    if update_every is None:
        update_every = 1 if method.chooses_weights else 4
    options = StepOptions(
        batch_size, mode, estimator, alpha_batch, alpha_batch_size, update_every, probe_every, normalize_alignments,
        entropy_bonus, ema_decay, micro_batches, row_metrics, Axis(axis_name),
    )  # fmt: skip
    check_together(options, method, filter, has_weighting=weighting is not None, has_rate=weight_optimizer is not None)
    evaluations = Evaluations(
        loss,
        specific_loss or loss,
        optimizer,
        derivatives or Finite(),
        param_filter,
        micro_batches,
        mesh,
        gather,
        options.axis,
    )
    scorer = weighting if isinstance(weighting, Scorer) else scorers.of_logits(weighting or scorers.no_logits)
    rule = filter or (filters.gumbel_top_k() if method.uses_weights else filters.uniform())
    parts = _Parts(
        evaluations,
        Chooser(evaluations, scorer, rule, options, method.uses_weights),
        optimizer,
        weight_optimizer or optax.identity(),
        method,
        options,
    )
    if method.update is None:
        return TrainStep(parts.init, parts.plain, parts.plain, parts.plain, parts.plain, parts.weighted, 1, 1)
    plain = parts.learn if method.chooses_weights else parts.plain
    reuse = parts.reuse if options.period > options.update_every else parts.learn
    return TrainStep(
        parts.init, parts.step, plain, parts.learn, reuse, parts.weighted, options.update_every, options.period
    )


_OF_ALPHA_STEPS = ("specific_loss", "weight_gradient_norm", "alignment_rms", "alpha_skipped")


class _Moved(NamedTuple):
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
class _Parts:
    """The parts of a step and the pure functions over them."""

    evaluations: Evaluations
    chooser: Chooser
    optimizer: optax.GradientTransformation
    weight_optimizer: optax.GradientTransformation
    method: Method
    options: StepOptions

    def init(
        self, rng: Array, params: Params, weight_params: Params | None = None, model_state: ModelState | None = None
    ) -> TrainState:
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
        )

    def step(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        options, arguments = self.options, (state, big_batch, specific_batch)

        def between(*arguments: Any) -> tuple[TrainState, Metrics]:
            if options.period == options.update_every:
                return self.plain(*arguments)
            return on_due(state.step, options.update_every, self.reuse, self.plain, arguments)

        return on_due(state.step, options.period, self.learn, between, arguments)

    def plain(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        chosen = self.chooser.choose(state, big_batch, keys_of(state, self.options.axis))
        return self._finish(state, chosen, self._plain(state, chosen.inner))

    def weighted(self, state: TrainState, batch: Batch, weights: Array) -> tuple[TrainState, Metrics, Params]:
        key = keys_of(state, self.options.axis).loss
        moved = self._plain(state, Inner(batch, weights, key, lambda _: ()))
        rows = {**moved.rows, "loss": moved.losses}
        means = {f"generic_{name}": estimators.total(weights * x, self.options.axis) for name, x in rows.items()}
        metrics = {name: x.astype(jnp.float32) for name, x in means.items()}
        return self._next(state, moved), {**metrics, **moved.asked}, moved.gradient

    def learn(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.update is not None
        return self._alpha_step(self.method.update, state, big_batch, specific_batch)

    def reuse(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.reuse is not None
        return self._alpha_step(self.method.reuse, state, big_batch, specific_batch)

    def _alpha_step(
        self, method: MethodFn, state: TrainState, big_batch: Batch, specific_batch: Batch
    ) -> tuple[TrainState, Metrics]:
        keys = keys_of(state, self.options.axis)
        chosen = self.chooser.choose(state, big_batch, keys)
        outer = chosen.outer()
        losses = self.evaluations.rows(state, outer.batch, outer.rng)
        problem = self.evaluations.problem(state, losses, outer.weights, specific_batch, keys.specific, keys.method)
        update = method(problem, state.method_state)
        moved = self._learn(state, chosen, outer, update)
        return self._finish(state, chosen, moved, update.weights)

    def _finish(
        self, state: TrainState, chosen: Chosen, moved: _Moved, weights: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        axis, scores = self.options.axis, chosen.scores(moved.losses)
        rows = {**moved.rows, "loss": moved.losses}
        means = {f"generic_{name}": estimators.total(x, axis) / self.options.batch_size for name, x in rows.items()}
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
            vectors["ids"] = batch["id"]
        taken = moved.asked.keys() & {**metrics, **vectors}.keys()
        if taken:
            raise UserError(
                f"row_metrics asks for {min(taken)!r}, and the step has a metric of that name: rename it in the loss's LossAux."
            )
        return self._next(state, moved), {**metrics, **vectors, **moved.asked}

    @property
    def _local(self) -> bool:
        """Whether each device chooses among its own rows."""
        return self.chooser.filter.scope == "local"

    def _plain(self, state: TrainState, inner: Inner) -> _Moved:
        """The θ-update alone: what every training step costs."""
        rows = self.evaluations.rows(state, inner.batch, inner.rng)
        values, aux, gradient = rows.pulled_back(self.options.axis.spread(state.params), inner.weights)
        metrics = {name: jnp.full((), NOT_COMPUTED) for name in _OF_ALPHA_STEPS}
        return self._move(state, values, aux, self.options.axis.sum(gradient), metrics)

    def _learn(self, state: TrainState, chosen: Chosen, outer: Inner, update: MethodUpdate) -> _Moved:
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
        cotangents = estimators.logit_cotangents(
            trees.widen(update.alignments),
            filters.usable(logits / temperature),
            options.estimator,
            num_rows=logits.shape[0] * axis.size,
            normalize=options.normalize_alignments,
            pull=estimators.entropy_pull(options.entropy_bonus, logits, scores.local, temperature, axis),
            axis=axis,
        )
        (gradient,) = pullback((cotangents / temperature).astype(logits.dtype))
        return axis.sum(gradient)

    def _move(self, state: TrainState, losses: Array, aux: LossAux, gradient: Params, metrics: Metrics) -> _Moved:
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return _Moved(
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

    def _next(self, state: TrainState, moved: _Moved) -> TrainState:
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
