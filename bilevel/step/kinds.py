"""What a built step is: pure functions, and the kinds of steps that one of them is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from bilevel.state import TrainState
from bilevel.step.choosing import Choice
from bilevel.types import Array, Batch, Metrics, Params

StepFn: TypeAlias = Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
"""`step(state, big_batch, specific_batch) -> (state, metrics)`."""


class TwoStage(NamedTuple):
    """One kind of step, cut where its rows are known: only those that the filter picks have to be there in full."""

    choose: Callable[[TrainState, Batch], Choice]
    """`choose(state, small_big_batch) -> choice`: which rows of the big batch, of which the arrays that the weighting network
    reads are given (and `id`, if the rows have one). It leaves the state as it is."""
    step_on: Callable[[TrainState, Batch, Batch, Choice], tuple[TrainState, Metrics]]
    """`step_on(state, rows, specific_batch, choice) -> (state, metrics)`: the step on the rows at `choice.positions` of the whole
    big batch, with the same state. State and metrics are those of the step in one stage."""


class Stages(NamedTuple):
    """The kinds of steps in two stages, by the names that they have in `TrainStep`."""

    plain: TwoStage
    learn: TwoStage
    reuse: TwoStage


class TrainStep(NamedTuple):
    """Pure functions that the user jits: `init` and `step`.

    For host loops there are the kinds of steps that `step` is one of.
    """

    init: Callable[..., TrainState]
    """`init(rng, params, weight_params={}, model_state=None) -> TrainState`; works under `jax.eval_shape` and `jax.jit`.
    Raises a UserError without weight_params for a method that learns them."""
    step: StepFn
    """`step(state, big_batch, specific_batch) -> (state, metrics)`; does the α-work when `state.step` is due, by `lax.cond`."""
    plain: StepFn
    """A step without α-work (the same as `learn` for a method that works on every step). For host loops: two programs run
    faster on CPU than the two branches of one."""
    learn: StepFn
    """A step with α-work (the same as `plain` for a method that learns nothing)."""
    reuse: StepFn
    """A step with α-work that takes the specific gradient from the state (`learn` itself where `probe_every` asks for none)."""
    weighted: Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics, Params]]
    """(state, batch of b rows, their weights `[b]`, which sum to 1) -> (state, metrics, the gradient Σ w_i ∇ℓ_i): the θ-update
    alone, on rows that were chosen before. Metrics: generic_loss and generic_NAME, weighted sums, and those of `row_metrics`."""
    stages: Stages
    """`plain`, `learn` and `reuse` in two stages, for rows that are loaded once they are chosen: in sparse mode, without
    `axis_name`, and with weights that the main model has no part in."""
    update_every: int
    period: int
    """The number of steps after which the kinds of steps repeat."""

    def at(self, step: int) -> StepFn:
        """Return `learn`, `reuse` or `plain`, whichever is due at this step."""
        return getattr(self, self._due(step))

    def stages_at(self, step: int) -> TwoStage:
        """Return the kind of step that is due at this step, in two stages."""
        return getattr(self.stages, self._due(step))

    def map(self, wrapper: Callable[[Any], Any]) -> TrainStep:
        """Wrap every kind of step, and every `step_on`; `weighted` is no kind of step.

        The same function is wrapped once, so that equal kinds stay equal.

        Args:
          wrapper: step function -> step function, as in `train.map(keep_sharding(where))`. Those of `step_on` take the choice
            after the batches.
        """
        kinds = {f: wrapper(f) for f in dict.fromkeys((self.step, self.plain, self.learn, self.reuse))}
        step, plain, learn, reuse = (kinds[f] for f in (self.step, self.plain, self.learn, self.reuse))
        staged = {stage: stage._replace(step_on=wrapper(stage.step_on)) for stage in dict.fromkeys(self.stages)}
        stages = Stages(*(staged[stage] for stage in self.stages))
        return self._replace(step=step, plain=plain, learn=learn, reuse=reuse, stages=stages)

    def _due(self, step: int) -> str:
        if step % self.period == 0:
            return "learn"
        return "plain" if step % self.update_every else "reuse"


def on_due(step: Array, every: int, due: Any, other: Any, arguments: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
    """Call `due` on each step that `every` divides, else `other`."""
    return due(*arguments) if every == 1 else jax.lax.cond(step % every == 0, due, other, *arguments)
