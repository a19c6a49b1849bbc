"""What a built step is: pure functions, and the kinds of steps that one of them is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from bilevel.state import TrainState
from bilevel.types import Array, Batch, Metrics, Params

StepFn: TypeAlias = Callable[[TrainState, Batch, Batch], tuple[TrainState, Metrics]]
"""`step(state, big_batch, specific_batch) -> (state, metrics)`."""


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
    update_every: int
    period: int
    """The number of steps after which the kinds of steps repeat."""

    def at(self, step: int) -> StepFn:
        """Return `learn`, `reuse` or `plain`, whichever is due at this step."""
        if step % self.period == 0:
            return self.learn
        return self.plain if step % self.update_every else self.reuse

    def map(self, wrapper: Callable[[StepFn], StepFn]) -> TrainStep:
        """Wrap every kind of step; `weighted` is none of them.

        The same function is wrapped once, so that equal kinds stay equal.

        Args:
          wrapper: step function -> step function, as in `train.map(keep_sharding(where))`.
        """
        kinds = {f: wrapper(f) for f in dict.fromkeys((self.step, self.plain, self.learn, self.reuse))}
        step, plain, learn, reuse = (kinds[f] for f in (self.step, self.plain, self.learn, self.reuse))
        return self._replace(step=step, plain=plain, learn=learn, reuse=reuse)


def on_due(step: Array, every: int, due: Any, other: Any, arguments: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
    """Call `due` on each step that `every` divides, else `other`."""
    return due(*arguments) if every == 1 else jax.lax.cond(step % every == 0, due, other, *arguments)
