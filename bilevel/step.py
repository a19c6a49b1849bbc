"""The train step, built from its parts: score, filter, differentiate, update θ and, on some steps, α.

    init, step = make_step(loss, weighting, optimizer, weight_optimizer, soba(optax.sgd(0.01)), batch_size=16)
    state = init(rng, params, weight_params)
    step = jax.jit(step, donate_argnums=0)
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

from bilevel import diagnostics, estimators, filters, selection, trees
from bilevel.collectives import axis_size, fold_index, mean_over, spread, spread_rows, sum_over
from bilevel.estimators import Estimator
from bilevel.linearization import Derivatives, Finite
from bilevel.methods.base import Method, MethodFn, MethodUpdate
from bilevel.options import AlphaBatch, Mode, StepOptions
from bilevel.problem import Evaluations
from bilevel.state import TrainState
from bilevel.types import Array, Batch, LogitFn, LossAux, LossFn, Metrics, ModelState, Params, UserError


class TrainStep(NamedTuple):
    """A pair of pure functions."""

    init: Callable[..., TrainState]
    """`init(rng, params, weight_params, model_state=None) -> TrainState`; works under `jax.eval_shape` and `jax.jit`."""
    step: Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
    """`step(state, big_batch, specific_batch) -> (state, metrics)`; does the α-work when `state.step` is due, by `lax.cond`."""
    plain: Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
    """A step without α-work. For host loops: two programs run faster on CPU than the two branches of one."""
    learn: Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
    """A step with α-work (the same as `plain` for a method that learns nothing)."""
    reuse: Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
    """A step with α-work that takes the specific gradient from the state (`learn` itself where `probe_every` asks for none)."""
    update_every: int
    period: int
    """The number of steps after which the kinds of steps repeat."""

    def at(self, step: int) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]:
        """`learn`, `reuse` or `plain`, whichever is due at this step: what `step` would do."""
        if step % self.period == 0:
            return self.learn
        return self.plain if step % self.update_every else self.reuse


def make_step(
    loss: LossFn,
    weighting: LogitFn,
    optimizer: optax.GradientTransformation,
    weight_optimizer: optax.GradientTransformation,
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
    update_every: int = 4,
    probe_every: int | None = None,
    normalize_alignments: bool = False,
    ema_decay: float | None = None,
    micro_batches: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """Builds the train step of one method.

    Sparse mode (Grangier et al., algorithm 1): the weighting network scores the B rows of the big batch without a gradient,
    the filter keeps b of them, θ is updated with uniform weights on those. Dense mode (Wang et al., algorithm 1): the big
    batch is the batch, and the softmax of its logits weighs the rows in the θ-update.

    Args:
      loss: per-example losses; see `bilevel.types.LossFn`.
      weighting: logits of a batch; see `bilevel.types.LogitFn`.
      optimizer: optax transformation of θ.
      weight_optimizer: optax transformation of α.
      method: what learns α, from `bilevel.methods`.
      batch_size: b, rows in a θ-update, over all devices.
      filter: how b of B rows are picked; `filters.gumbel_top_k()` by default. Unused in dense mode but for its temperature.
      derivatives: `linearization.Finite()` (the default: cheapest) or `linearization.Forward()` (exact).
      specific_loss: the loss on specific rows, if it differs from `loss`.
      param_filter: path -> whether the probe covers that parameter; None covers all. Paths look like "block_1/mlp/kernel".
      mode: "sparse" or "dense".
      estimator: "softmax" or "score"; see `bilevel.estimators`.
      alpha_batch: where the rows of the α-gradient come from: the filter ("filtered", in which case they are the rows of the
        θ-update unless `alpha_batch_size` says otherwise) or a uniform draw from the big batch.
      alpha_batch_size: rows in the α-gradient; None takes b.
      update_every: α changes on steps 0, k, 2k, …; the others cost no more than scoring.
      probe_every: the specific batch is evaluated, and the method's state changes, on these steps only; the α-steps between them
        use the specific gradient that the state remembers, for one forward pass with `Finite()`. A multiple of `update_every`;
        None: on every α-step. Needs a method that remembers: SOBA, or DDS and Anograd with `average_specific`.
      normalize_alignments: scale the alignments of each α-step to root mean square 1.
      ema_decay: keep an exponential moving average of (params, model_state) with this decay.
      micro_batches: evaluate the b rows (and the specific batch) in this many equal parts, one after the other: the same update
        to rounding with the activations of one part in memory. See `bilevel.rows.RowLosses`.
      mesh: the devices that rows are spread over under plain `jit`: those that the filter picks are spread over it too, and split
        parameters (`bilevel.sharding.split_state`) are gathered where they are used. With None the compiler decides, and tends
        to compute all rows on every device.
      axis_name: the mapped axis of `pmap` or `shard_map` that the rows are spread over. Leave None under plain `jit`, also
        with sharded arrays.

    Returns:
      `TrainStep(init, step)`. The metrics are float32 scalars: generic_loss (mean of the rows of the θ-update),
      specific_loss (NaN on steps without α-work), effective_sample_size, weight_entropy, largest_weight (over the big
      batch), temperature, weight_gradient_norm and alignment_rms (both NaN without α-work); and `selected`, int32 `[b]`: the
      positions in the big batch of the rows of the θ-update.

    Raises:
      UserError: for options that do not go together, now; for shapes that do not fit, when the step is traced.
    """
    options = StepOptions(
        batch_size, mode, estimator, alpha_batch, alpha_batch_size, update_every, probe_every, normalize_alignments,
        ema_decay, micro_batches, axis_name,
    )  # fmt: skip
    parts = _Parts(
        Evaluations(
            loss,
            specific_loss or loss,
            optimizer,
            derivatives or Finite(),
            param_filter,
            micro_batches,
            mesh,
            axis_name,
        ),
        weighting,
        optimizer,
        weight_optimizer,
        method,
        filter or (filters.gumbel_top_k() if method.uses_weights else filters.uniform()),
        options,
    )
    if method.update is None:
        return TrainStep(parts.init, parts.plain, parts.plain, parts.plain, parts.plain, 1, 1)
    if options.period > update_every and method.reuse is None:
        raise UserError(
            f"probe_every={probe_every} needs a method that remembers the specific gradient: "
            "give dds or anograd an average_specific, or leave probe_every away."
        )
    reuse = parts.reuse if options.period > update_every else parts.learn
    return TrainStep(parts.init, parts.step, parts.plain, parts.learn, reuse, update_every, options.period)


class _Keys(NamedTuple):
    """Random keys of one step."""

    filter: Array
    alpha: Array
    loss: Array
    specific: Array


class _Inner(NamedTuple):
    """Rows for one evaluation of the inner loss, and their weights."""

    batch: Batch
    weights: Array
    rng: Array


class _Moved(NamedTuple):
    """What one step changes, from the branch that computed it."""

    losses: Array
    model_state: ModelState
    params: Params
    opt_state: Any
    weight_params: Params
    weight_opt_state: Any
    method_state: Any
    metrics: Metrics


@dataclass(frozen=True, eq=False)
class _Parts:
    """The parts of a step and the pure functions over them."""

    evaluations: Evaluations
    weighting: LogitFn
    optimizer: optax.GradientTransformation
    weight_optimizer: optax.GradientTransformation
    method: Method
    filter: filters.Filter
    options: StepOptions

    def init(
        self, rng: Array, params: Params, weight_params: Params, model_state: ModelState | None = None
    ) -> TrainState:
        subset = self.evaluations.subset(params)
        # Copies, so that donating the state takes no array away from the caller.
        params, weight_params, rng = jax.tree.map(jnp.copy, (params, weight_params, rng))
        model_state = jax.tree.map(jnp.copy, {} if model_state is None else model_state)
        ema = None if self.options.ema_decay is None else (params, model_state)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=self.optimizer.init(params),
            weight_params=weight_params,
            weight_opt_state=self.weight_optimizer.init(weight_params),
            method_state=self.method.init(subset.restrict(params)),
            ema=jax.tree.map(jnp.copy, ema),
            rng=rng,
        )

    def step(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        options, arguments = self.options, (state, big_batch, specific_batch)

        def between(*arguments: Any) -> tuple[TrainState, Metrics]:
            if options.period == options.update_every:
                return self.plain(*arguments)
            return _on_due(state.step, options.update_every, self.reuse, self.plain, arguments)

        return _on_due(state.step, options.period, self.learn, between, arguments)

    def plain(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        keys = self._keys(state)
        scores = self._score(state, big_batch)
        rows, inner = self._inner(keys, scores, big_batch)
        return self._finish(state, self._plain(state, inner), scores, rows)

    def learn(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.update is not None
        return self._alpha_step(self.method.update, state, big_batch, specific_batch)

    def reuse(self, state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, Metrics]:
        assert self.method.reuse is not None
        return self._alpha_step(self.method.reuse, state, big_batch, specific_batch)

    def _alpha_step(
        self, update: MethodFn, state: TrainState, big_batch: Batch, specific_batch: Batch
    ) -> tuple[TrainState, Metrics]:
        keys = self._keys(state)
        scores = self._score(state, big_batch)
        rows, inner = self._inner(keys, scores, big_batch)
        outer = inner if self.options.shares_rows else self._alpha_rows(state, scores, big_batch, keys.alpha)
        losses = self.evaluations.rows(state, outer.batch, outer.rng)
        problem = self.evaluations.problem(state, losses, outer.weights, specific_batch, keys.specific)
        moved = self._learn(state, inner, outer, update(problem, state.method_state), scores.temperature)
        return self._finish(state, moved, scores, rows)

    def _keys(self, state: TrainState) -> _Keys:
        key = jax.random.fold_in(state.rng, state.step)
        keys = _Keys(*jax.random.split(key, 4))
        axis = self.options.axis_name
        return keys._replace(loss=fold_index(keys.loss, axis), specific=fold_index(keys.specific, axis))

    def _inner(self, keys: _Keys, scores: selection.Scores, big_batch: Batch) -> tuple[selection.Rows, _Inner]:
        rows, weights = self._rows(keys.filter, scores, big_batch)
        return rows, _Inner(rows.batch, weights, keys.loss)

    def _finish(
        self, state: TrainState, moved: _Moved, scores: selection.Scores, rows: selection.Rows
    ) -> tuple[TrainState, Metrics]:
        axis = self.options.axis_name
        generic_loss = estimators.total(moved.losses, axis) / self.options.batch_size
        metrics = {"generic_loss": generic_loss, **moved.metrics, "temperature": scores.temperature}
        metrics |= diagnostics.weight_metrics(scores.pool, axis if self.filter.scope == "local" else None)
        metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
        return self._next(state, moved), {**metrics, "selected": rows.positions}

    def _score(self, state: TrainState, big_batch: Batch) -> selection.Scores:
        if self.method.uses_weights:
            return selection.score(self.weighting, state.weight_params, big_batch, self.filter, self.options.axis_name)
        flat = jnp.zeros(trees.num_rows(big_batch))
        everyone = axis_size(self.options.axis_name) if self.filter.scope == "global" else 1
        return selection.Scores(flat, jnp.tile(flat, everyone), jnp.ones(()))

    def _rows(self, key: Array, scores: selection.Scores, big_batch: Batch) -> tuple[selection.Rows, Array]:
        """The rows of the θ-update and their weights, which sum to 1 over all devices."""
        options, axis = self.options, self.options.axis_name
        local, devices = trees.num_rows(big_batch), axis_size(axis)
        if options.mode == "dense":
            if local * devices != options.batch_size:
                raise UserError(
                    f"In dense mode the big batch is the batch, but it has {local * devices} rows and "
                    f"batch_size={options.batch_size}: make them equal."
                )
            positions = jnp.arange(local, dtype=jnp.int32)
            return selection.Rows(big_batch, positions), estimators.softmax(scores.local, axis)
        if local * devices == options.batch_size and not self.method.uses_weights:
            rows = selection.Rows(big_batch, jnp.arange(local, dtype=jnp.int32))  # nothing to choose
        else:
            rows = self._picked(key, scores, big_batch, options.batch_size, self.filter)
        share = options.batch_size // devices
        return rows, spread(jnp.full((share,), 1.0 / options.batch_size), axis)

    def _picked(
        self, key: Array, scores: selection.Scores, big_batch: Batch, count: int, rule: filters.Filter
    ) -> selection.Rows:
        rows = selection.pick(key, scores, big_batch, count, rule, self.options.axis_name)
        return rows._replace(batch=spread_rows(rows.batch, self.evaluations.mesh))

    def _plain(self, state: TrainState, inner: _Inner) -> _Moved:
        """The θ-update alone: what every training step costs."""
        rows = self.evaluations.rows(state, inner.batch, inner.rng)
        values, aux, gradient = rows.pulled_back(spread(state.params, self.options.axis_name), inner.weights)
        nothing = jnp.full((), jnp.nan)
        metrics: Metrics = {"specific_loss": nothing, "weight_gradient_norm": nothing, "alignment_rms": nothing}
        return self._move(state, values, aux, sum_over(gradient, self.options.axis_name), metrics)

    def _learn(
        self, state: TrainState, inner: _Inner, outer: _Inner, update: MethodUpdate, temperature: Array
    ) -> _Moved:
        """The θ-update and the α-update, both from the same θ and α."""
        weight_gradient, rms = self._weight_gradient(state, outer.batch, update, temperature)
        updates, weight_opt_state = self.weight_optimizer.update(
            weight_gradient, state.weight_opt_state, state.weight_params
        )
        metrics: Metrics = {
            "specific_loss": update.specific_loss,
            "weight_gradient_norm": trees.norm(weight_gradient),
            "alignment_rms": rms,
        }
        if self.options.shares_rows:
            moved = self._move(state, update.losses, update.aux, update.gradient, metrics)
        else:
            later = dataclasses.replace(state, params=trees.after(state.params, update.gradient))
            moved = self._plain(later, inner)._replace(metrics=metrics)
        return moved._replace(
            weight_params=optax.apply_updates(state.weight_params, updates),
            weight_opt_state=weight_opt_state,
            method_state=update.state,
        )

    def _alpha_rows(self, state: TrainState, scores: selection.Scores, big_batch: Batch, key: Array) -> _Inner:
        """Rows of the α-gradient when they are not those of the θ-update."""
        options, axis = self.options, self.options.axis_name
        count = options.alpha_batch_size or options.batch_size
        pick_key, loss_key = jax.random.split(key)
        rule = self.filter
        if options.alpha_batch == "uniform":
            rule = filters.uniform(scope=self.filter.scope)
        rows = self._picked(pick_key, scores, big_batch, count, rule)
        if options.alpha_batch == "filtered":
            weights = spread(jnp.full((count // axis_size(axis),), 1.0 / count), axis)
        else:
            logits = self.weighting(state.weight_params, rows.batch) / scores.temperature
            weights = estimators.softmax(logits, axis)
        return _Inner(rows.batch, weights, fold_index(loss_key, axis))

    def _weight_gradient(
        self, state: TrainState, rows: Batch, update: MethodUpdate, temperature: Array
    ) -> tuple[Params, Array]:
        """Σ a_i ∇_α w_i by one pass back through the weighting network; and the alignments' root mean square."""
        options, axis = self.options, self.options.axis_name
        logits, pullback = jax.vjp(lambda p: self.weighting(p, rows), spread(state.weight_params, axis))
        count = logits.shape[0] * axis_size(axis)
        alignments = update.alignments.astype(jnp.promote_types(update.alignments.dtype, jnp.float32))
        cotangents = estimators.logit_cotangents(
            alignments,
            logits / temperature,
            options.estimator,
            num_rows=count,
            normalize=options.normalize_alignments,
            axis_name=axis,
        )
        (gradient,) = pullback((cotangents / temperature).astype(logits.dtype))
        rms = jnp.sqrt(estimators.total(alignments**2, axis) / count)
        return sum_over(gradient, axis), rms

    def _move(self, state: TrainState, losses: Array, aux: LossAux, gradient: Params, metrics: Metrics) -> _Moved:
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return _Moved(
            losses,
            mean_over(aux.model_state, self.options.axis_name),
            optax.apply_updates(state.params, updates),
            opt_state,
            state.weight_params,
            state.weight_opt_state,
            state.method_state,
            metrics,
        )

    def _next(self, state: TrainState, moved: _Moved) -> TrainState:
        ema = state.ema
        if self.options.ema_decay is not None:
            ema = trees.average((moved.params, moved.model_state), state.ema, self.options.ema_decay)
        return TrainState(
            step=state.step + 1,
            params=moved.params,
            model_state=moved.model_state,
            opt_state=moved.opt_state,
            weight_params=moved.weight_params,
            weight_opt_state=moved.weight_opt_state,
            method_state=moved.method_state,
            ema=ema,
            rng=state.rng,
        )


def _on_due(step: Array, every: int, due: Any, other: Any, arguments: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
    return due(*arguments) if every == 1 else jax.lax.cond(step % every == 0, due, other, *arguments)
