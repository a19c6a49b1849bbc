"""The train step: score, filter, differentiate, update θ and, at times, α.

    train = make_step(loss, weighting, optimizer, weight_optimizer, soba(optax.sgd(0.01)), batch_size=16)
    state = train.init(rng, params, weight_params)
    step = jax.jit(train.step, donate_argnums=0)
    state, metrics = step(state, big_batch, specific_batch)

The step is a pure function that the user jits, shards or scans. All randomness comes from `state.rng` and `state.step`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from bilevel.derivatives.linearization import Derivatives, Finite
from bilevel.devices.axis import Axis
from bilevel.methods.base import Method
from bilevel.selection import filters, scorers
from bilevel.selection.scorers import Scorer
from bilevel.selection.uses import MaxUses
from bilevel.step.choosing import Chooser
from bilevel.step.estimators import Estimator
from bilevel.step.kinds import StepFn as StepFn
from bilevel.step.kinds import TrainStep as TrainStep
from bilevel.step.options import AlphaBatch, Mode, StepOptions, check_parts, check_together
from bilevel.step.parts import Parts
from bilevel.step.problem import Evaluations
from bilevel.types import LogitFn, LossFn


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
    shift_pull: float = 0.0,
    ema_decay: float | None = None,
    micro_batches: int = 1,
    row_metrics: tuple[str, ...] = (),
    max_uses: MaxUses | None = None,
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
      shift_pull: κ ≥ 0. κ E_w[s] is added to the cotangent of each logit, in proportion to the row's weight: that draws the
        weighted mean of the logits to 0. A common shift changes no weight, so that nothing else holds it; where logits are
        bounded (`bilevel.scorers.bounded`) all may drift to the bound, and differ no more. Costs nothing.
      ema_decay: keep an exponential moving average of (params, model_state) with this decay, in at least float32.
      micro_batches: evaluate the b rows (and the specific batch) in this many equal parts, one after the other: the same update
        to rounding with the activations of one part in memory. See `bilevel.derivatives.rows.RowLosses`.
      row_metrics: names of the per-example metrics of `loss` that the step returns for the rows of the θ-update, as its own
        evaluation gave them.
      max_uses: no row is trained on more often than this says; sparse mode, and a filter that goes by logits. See
        `bilevel.MaxUses`. None: no limit.
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
      `weights`, float32 `[b]`. With `max_uses` there is rows_left_out, how many of the b rows were used up: they have the
      weight 0 and the id −1. Those named by `row_metrics` follow, `[b, …]`.

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
        entropy_bonus, shift_pull, ema_decay, micro_batches, row_metrics, max_uses, Axis(axis_name),
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
        options.averaged_by,
    )
    scorer = weighting if isinstance(weighting, Scorer) else scorers.of_logits(weighting or scorers.no_logits)
    rule = filter or (filters.gumbel_top_k() if method.uses_weights else filters.uniform())
    parts = Parts(
        evaluations,
        Chooser(evaluations, scorer, rule, options, method.uses_weights),
        optimizer,
        weight_optimizer or optax.identity(),
        method,
        options,
    )
    stages = parts.stages()
    if method.update is None:
        return TrainStep(parts.init, parts.plain, parts.plain, parts.plain, parts.plain, parts.weighted, stages, 1, 1)
    plain = parts.learn if method.chooses_weights else parts.plain
    reuse = parts.reuse if options.period > options.update_every else parts.learn
    return TrainStep(
        parts.init, parts.step, plain, parts.learn, reuse, parts.weighted, stages, options.update_every, options.period
    )
