"""The step of a sampled run: draw, train, observe, at times reward and learn.

The sampler picks rows from data on the device.

sampler = samplers.rl_sampler(num_rows=N, batch_size=k, num_outputs=classes)
sampled = make_sampled_step(sampler, loss, optax.sgd(0.1, momentum=0.9))
state = sampled.init(rng, params)
step = jax.jit(sampled.step, donate_argnums=0)
state, metrics = step(state, data, validation)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bilevel import trees
from bilevel.derivatives.linearization import Finite
from bilevel.derivatives.optimizers import warn_of_derivative_zero
from bilevel.derivatives.rows import RowLosses
from bilevel.devices.axis import ALONE
from bilevel.methods import uniform
from bilevel.samplers.base import Sampler
from bilevel.state import TrainState
from bilevel.step.choosing import keys_of
from bilevel.step.problem import Evaluations
from bilevel.step.train_step import TrainStep, make_step
from bilevel.types import NOT_COMPUTED, Array, Batch, LossFn, Metrics, ModelState, Params, UserError


@struct.dataclass
class SampledState:
    """All that changes while training with a sampler."""

    train: TrainState
    sampler: Any

    @property
    def step(self) -> Array:
        """int32 scalar: the number of θ-updates done."""
        return self.train.step

    @property
    def params(self) -> Params:
        """θ."""
        return self.train.params

    @property
    def model_state(self) -> ModelState:
        """BatchNorm statistics and the like."""
        return self.train.model_state


SampledFn: TypeAlias = Callable[[SampledState, Batch, Batch], tuple[SampledState, Metrics]]
"""`(state, data, validation) -> (state, metrics)`: all N rows to draw from, and all validation rows, on the device."""


class SampledStep(NamedTuple):
    """Pure functions that the user jits: `init` and `step`.

    For host loops there are the kinds of steps that `step` is one of.
    """

    init: Callable[..., SampledState]
    """`init(rng, params, model_state=None, sampler_params=None)`; `sampler_params` (`state.sampler.params` of another run)
    make a learned sampler begin from what that run learned."""
    step: SampledFn
    """One iteration; whether reward and update are due follows from `state.step` (or the sampler's state), by `lax.cond`."""
    kinds: tuple[SampledFn, SampledFn, SampledFn, SampledFn]
    """Iterations without a `cond`: plain, with an update of the sampler, with a reward, and with both. All are `step` for a
    sampler whose state says what is due."""
    reward_every: int
    period: int
    """The number of iterations after which they repeat: the sampler's `update_every`."""

    def at(self, step: int) -> SampledFn:
        """Return the function that is due at this step: an iteration without a `cond`, where that is known."""
        reward, update = (step + 1) % self.reward_every == 0, (step + 1) % self.period == 0
        return self.kinds[2 * reward + update]

    def map(self, wrapper: Callable[[SampledFn], SampledFn]) -> SampledStep:
        """Wrap every kind of step, as `TrainStep.map` does: one observer serves both.

        Args:
          wrapper: step function -> step function.
        """
        wrapped = {function: wrapper(function) for function in dict.fromkeys((self.step, *self.kinds))}
        plain, update, reward, both = (wrapped[function] for function in self.kinds)
        return self._replace(step=wrapped[self.step], kinds=(plain, update, reward, both))


def make_sampled_step(
    sampler: Sampler,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    outputs: str = "logits",
    validation_loss: LossFn | None = None,
    validation_micro_batches: int = 1,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    through_optimizer: bool = False,
) -> SampledStep:
    """Build the iteration of a sampled run around the θ-update of `make_step`.

    The sampler observes the outputs of the θ-update's own evaluation (at θ before the update), or its gradient. The reward is
    evaluated after the update, on all validation rows; the model state that this evaluation returns is thrown away.

    Args:
      sampler: from `bilevel.samplers`.
      loss: per-example losses; for a sampler that observes the model their metrics must hold `outputs`.
      optimizer: optax transformation of θ.
      outputs: name of that per-example metric, `[b, …]`.
      validation_loss: the loss of the reward; None takes `loss`, so that dropout, augmentation and BatchNorm are as in
        training (the paper's appendix B).
      validation_micro_batches: evaluate the validation rows in this many equal parts, one after the other (and with BatchNorm
        statistics of their own: the paper has 5 parts of 128 rows).
      micro_batches: see `make_step`.
      ema_decay: see `make_step`.
      through_optimizer: pull the gradient of the validation loss back through the θ-update just made, −(∂U/∂g)ᵀ ∇L_val with U the
        update and g its gradient, before a sampler that asks for it gets it (DDS, appendix A.1). False: as it is.

    Returns:
      The functions. Metrics: generic_loss and generic_NAME as in `make_step`; `selected`, int32 `[b]`, the numbers of the rows
      drawn; `ids`, int32 `[b]`, what the data have for these rows as `id` (their numbers in data without it), both −1 at
      places without a row; validation_loss and what the sampler reports, both −∞ (`bilevel.types.NOT_COMPUTED`) where they are
      not due.

    Raises:
      UserError: for a number of parts below 1, or through_optimizer with a sampler that asks for no gradient, now; for data that
        do not fit the sampler, when traced.
    """
    if validation_micro_batches < 1:
        raise UserError(f"validation_micro_batches={validation_micro_batches} must be at least 1.")
    if through_optimizer and sampler.reward_gradient is None:
        raise UserError(
            "through_optimizer=True needs a sampler that learns from the gradient of the validation loss (multilingual_dds with "
            'specific_rows="dev"): omit it.'
        )
    names = () if sampler.observe is None else (outputs,)
    train = make_step(
        loss, None, optimizer, None, uniform(), batch_size=sampler.batch_size,
        micro_batches=micro_batches, ema_decay=ema_decay, row_metrics=names,
    )  # fmt: skip
    validation_loss = validation_loss or loss
    evaluations = Evaluations(
        validation_loss, validation_loss, optimizer, Finite(), None, validation_micro_batches, None, None, ALONE
    )
    parts = _Parts(sampler, train, evaluations, outputs, through_optimizer)
    step = parts.kind(None, None)
    kinds = (step, step, step, step)
    if sampler.due is None:
        kinds = (parts.kind(False, False), parts.kind(False, True), parts.kind(True, False), parts.kind(True, True))
    return SampledStep(parts.init, step, kinds, sampler.reward_every, sampler.update_every)


@dataclass(frozen=True, eq=False)
class _Parts:
    """The parts of an iteration and the pure functions over them."""

    sampler: Sampler
    train: TrainStep
    evaluations: Evaluations
    """Of the validation loss."""
    outputs: str
    through_optimizer: bool

    def init(
        self, rng: Array, params: Params, model_state: ModelState | None = None, sampler_params: Any = None
    ) -> SampledState:
        for_train, for_sampler = jax.random.split(rng)
        train = self.train.init(for_train, params, model_state=model_state)
        if self.through_optimizer:
            warn_of_derivative_zero(self.evaluations.optimizer, params, 1, False)
        # Copies, as no array can be donated twice and a sampler may begin with one in two places.
        return SampledState(train, jax.tree.map(jnp.copy, self.sampler.init(for_sampler, sampler_params)))

    def kind(self, rewards: bool | None, learns: bool | None) -> SampledFn:
        """Make an iteration of which it is known what is due.

        None: it follows from the step.
        """
        sampler = self.sampler

        def due(state: SampledState, every: int, known: bool | None) -> bool | Array:
            if sampler.due is not None:
                return sampler.due(state.sampler)
            return state.step % every == 0 if known is None else known

        def step(state: SampledState, data: Batch, validation: Batch) -> tuple[SampledState, Metrics]:
            before = state.train
            state, metrics, gradient = self._iterate(state, data)
            reward = self._reward_fn(validation, before, gradient)
            if reward is not None:
                state, found = _when(due(state, sampler.reward_every, rewards), reward, state)
                metrics |= found
            if sampler.learn is not None:
                state, found = _when(due(state, sampler.update_every, learns), self._learn, state)
                metrics |= found
            return state, metrics

        return step

    def _iterate(self, state: SampledState, data: Batch) -> tuple[SampledState, Metrics, Params]:
        """Draw, θ-update, observe. The gradient is None where nobody needs it."""
        self._check(data)
        rows, sampler, drawn = self.sampler.draw(state.sampler)
        gradient = None
        if self.sampler.pads or self.sampler.observe_gradient is not None:
            real = rows >= 0
            # Another row of the draw stands where there is none: statistics over the batch (BatchNorm) see drawn rows alone.
            batch = trees.take(data, jnp.where(real, rows, rows[0]))
            train, found, gradient = self.train.weighted(state.train, batch, real / jnp.sum(real))
            ids = jnp.where(real, batch["id"], -1) if isinstance(batch, dict) and "id" in batch else rows
        else:
            batch = trees.take(data, rows)
            train, found = self.train.plain(state.train, batch, batch)
            ids = found.get("ids", rows)
        if self.sampler.observe is not None:
            sampler = self.sampler.observe(sampler, found[self.outputs])
        if self.sampler.observe_gradient is not None:
            sampler = self.sampler.observe_gradient(sampler, gradient)
        means = {name: x for name, x in found.items() if name.startswith("generic_")}
        return SampledState(train, sampler), {**means, **drawn, "selected": rows, "ids": ids}, gradient

    def _reward_fn(self, validation: Batch, before: TrainState, gradient: Params) -> _Part | None:
        """What turns the state after the θ-update into that with a reward; None for a sampler that needs none."""
        reward, reward_gradient = self.sampler.reward, self.sampler.reward_gradient

        def by_loss(state: SampledState) -> tuple[Any, Metrics, Array]:
            assert reward is not None
            train, key = state.train, keys_of(state.train, ALONE).specific
            evaluations = self.evaluations
            rows = RowLosses(evaluations.loss, train.model_state, validation, key, evaluations.micro_batches)
            loss = jnp.mean(trees.widen(rows(train.params)[0]))
            return *reward(state.sampler, loss), loss

        def by_gradient(state: SampledState) -> tuple[Any, Metrics, Array]:
            assert reward_gradient is not None
            train, key = state.train, keys_of(state.train, ALONE).specific
            everything = trees.make_subset(None, train.params)
            loss, found = self.evaluations.specific_gradient(train, everything, train.params, validation, key)
            if self.through_optimizer:
                _, _, pullback = self.evaluations.lookahead(before, everything, gradient)
                found = jax.tree.map(jnp.negative, pullback(found))
            return *reward_gradient(state.sampler, found), loss

        evaluate = by_loss if reward is not None else None if reward_gradient is None else by_gradient
        if evaluate is None:
            return None

        def rewarded(state: SampledState) -> tuple[SampledState, Metrics]:
            sampler, metrics, loss = evaluate(state)
            return SampledState(state.train, sampler), {"validation_loss": loss, **metrics}

        return rewarded

    def _learn(self, state: SampledState) -> tuple[SampledState, Metrics]:
        assert self.sampler.learn is not None
        sampler, metrics = self.sampler.learn(state.sampler)
        return SampledState(state.train, sampler), metrics

    def _check(self, data: Batch) -> None:
        rows = trees.num_rows(data)
        if rows != self.sampler.num_rows:
            raise UserError(
                f"The data have {rows} rows, but the sampler was made for num_rows={self.sampler.num_rows}: make them equal."
            )


_Part: TypeAlias = Callable[[SampledState], tuple[SampledState, Metrics]]


def _when(due: bool | Array, part: _Part, state: SampledState) -> tuple[SampledState, Metrics]:
    """What the part does where it is due; elsewhere the state, NOT_COMPUTED. Only the sampler's state goes through a `cond`."""

    def other() -> tuple[Any, Metrics]:
        _, shapes = jax.eval_shape(part, state)
        return state.sampler, {name: jnp.full(x.shape, NOT_COMPUTED, x.dtype) for name, x in shapes.items()}

    def done() -> tuple[Any, Metrics]:
        moved, metrics = part(state)
        return moved.sampler, metrics

    if isinstance(due, bool):
        sampler, metrics = done() if due else other()
    else:
        sampler, metrics = jax.lax.cond(due, done, other)
    return SampledState(state.train, sampler), metrics
