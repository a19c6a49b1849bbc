"""The two halves of a train step that a loop of your own calls: which rows, and what their weights learn.

    halves = make_halves(loss, weighting, optax.adam(1e-2), soba(optax.adam(2e-3)), batch_size=16)
    weights = halves.init(params, weight_params)
    select, learn = jax.jit(halves.select), jax.jit(halves.learn)

    chosen = select(weights, big_batch, key)
    weights, metrics = learn(weights, params, chosen, specific_batch, key)  # before the update of θ, when it is due
    params = ...                                                            # your own update, on chosen.rows

θ, its optimizer and all else of the loop stay where they are. Both halves are pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import struct

from bilevel import trees
from bilevel.methods.base import Method
from bilevel.state import TrainState
from bilevel.step.choosing import Choice
from bilevel.step.train_step import make_step
from bilevel.types import Array, Batch, LogitFn, LossFn, Metrics, ModelState, Params, UserError

_ABOUT_ROWS = ("selected", "ids", "weights", "bad_logit_row")


@struct.dataclass
class WeightState:
    """All that the halves remember. A pytree: save it with your own checkpoint, and the run continues as if never stopped."""

    step: Array
    """int32 scalar: the number of calls of `learn`."""
    weight_params: Params
    """α, the parameters of the weighting network."""
    weight_opt_state: optax.OptState
    """State of the optimizer of α."""
    method_state: Any
    """What the method keeps between calls."""


class Selection(NamedTuple):
    """Rows that were picked from a big batch."""

    rows: Batch
    """`[b, …]`: train on these, all with the same weight."""
    positions: Array
    """int32 `[b]`: where they were in the big batch."""
    choice: Choice
    """What `learn` needs to know of the big batch."""


class Halves(NamedTuple):
    """The functions of `make_halves`."""

    init: Callable[[Params, Params], WeightState]
    """(θ, α) -> the state of the weights."""
    select: Callable[[WeightState, Batch, Array], Selection]
    """(weights, big batch `[B, …]`, key) -> the rows to train on. No derivative is taken, and θ is not needed."""
    learn: Callable[..., tuple[WeightState, Metrics]]
    """(weights, θ, selection, specific batch, key, model state = {}) -> the weights after one α-step, and its metrics, float32
    scalars: generic_loss, specific_loss, effective_sample_size and the others of `bilevel.make_step`."""


def make_halves(
    loss: LossFn,
    weighting: LogitFn,
    weight_optimizer: optax.GradientTransformation,
    method: Method,
    *,
    batch_size: int,
    **options: Any,
) -> Halves:
    """Build the two halves of the sparse step, for a loop that keeps θ and its optimizer to itself.

    With the same keys they choose the rows, and give α the updates, of `make_step` with `update_every=1` and θ's optimizer in the
    loop (Grangier et al., algorithm 1).

    Args:
      loss: per-example losses; see `bilevel.types.LossFn`. What it changes in the model state is not kept.
      weighting: logits of a batch.
      weight_optimizer: optax transformation of α.
      method: what learns α. One that looks ahead by θ's optimizer needs an own one: `dds(unroll=optax.sgd(ρ))`,
        `anograd(through_optimizer=False)`.
      batch_size: b, rows that are picked.
      options: filter, derivatives, specific_loss, param_filter, estimator, normalize_alignments, entropy_bonus, shift_pull,
        micro_batches and mesh, as in `bilevel.make_step`.

    Raises:
      UserError: for options that do not go together, a method that chooses weights by itself, or one that looks ahead by an
        optimizer that is not here.
    """
    if method.update is None or method.chooses_weights:
        raise UserError(
            "This method learns no weighting network, so that there is nothing for the halves: give soba, penalty, dds, anograd "
            "or an implicit one."
        )
    if method.looks_ahead:
        raise UserError(
            "This method looks ahead by θ's optimizer, which stays in your loop: give dds(unroll=optax.sgd(ρ)) or "
            "anograd(through_optimizer=False)."
        )
    if options.get("max_uses") is not None:
        raise UserError(
            "max_uses counts the rows of each θ-update, which the halves do not see: leave rows out of your big batches, or "
            "omit it."
        )
    if not callable(weighting):
        raise UserError(
            "The weighting of the halves sees rows alone: give a function (weight_params, batch) -> logits."
        )
    step = make_step(
        loss, weighting, optax.sgd(0.0), weight_optimizer, method, batch_size=batch_size, update_every=1, **options
    )  # fmt: skip
    stages = step.stages.learn

    def state_of(weights: WeightState, params: Params, model_state: ModelState, key: Array) -> TrainState:
        empty = optax.sgd(0.0).init({})
        kept = weights.weight_params, weights.weight_opt_state, weights.method_state
        return TrainState(weights.step, params, model_state, empty, *kept, None, key)

    def init(params: Params, weight_params: Params) -> WeightState:
        begun = step.init(jnp.zeros((), jnp.int32), params, weight_params)
        return WeightState(begun.step, begun.weight_params, begun.weight_opt_state, begun.method_state)

    def select(weights: WeightState, big_batch: Batch, key: Array) -> Selection:
        choice = stages.choose(state_of(weights, {}, {}, key), big_batch)
        return Selection(trees.take(big_batch, choice.positions), choice.positions, choice)

    def learn(
        weights: WeightState,
        params: Params,
        selection: Selection,
        specific_batch: Batch,
        key: Array,
        model_state: ModelState | None = None,
    ) -> tuple[WeightState, Metrics]:
        state = state_of(weights, params, {} if model_state is None else model_state, key)
        after, metrics = stages.step_on(state, selection.rows, specific_batch, selection.choice)
        found = WeightState(after.step, after.weight_params, after.weight_opt_state, after.method_state)
        return found, {name: value for name, value in metrics.items() if name not in _ABOUT_ROWS}

    return Halves(init, select, learn)
