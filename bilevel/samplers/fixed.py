"""The samplers that learn nothing: uniform epochs, and a replayed sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.samplers.base import Sampler, check_sizes
from bilevel.selection.metrics import weight_metrics
from bilevel.types import Array, Metrics, UserError


class UniformState(NamedTuple):
    """State of `uniform`."""

    drawn: Array
    """int32 scalar: rows of the current epoch that are used."""
    epoch: Array
    """int32 scalar."""
    order: Array
    """int32 `[N]`, the permutation of the current epoch."""
    rng: Array
    """A typed key that never changes."""


def uniform(num_rows: int, batch_size: int) -> Sampler:
    """Draw without replacement, each epoch in a new order.

    Batches run over the ends of epochs.

    The baseline of RLSampler's paper.

    Args:
      num_rows: N.
      batch_size: b, at most N.

    Raises:
      UserError: for sizes that make no sense.
    """
    check_sizes(num_rows, batch_size)
    if batch_size > num_rows:
        raise UserError(f"batch_size={batch_size} rows cannot be drawn without repeats from num_rows={num_rows}.")

    def order(rng: Array, epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(rng, epoch), num_rows).astype(jnp.int32)

    def init(rng: Array, params: Any = None) -> UniformState:
        _refuse(params, "uniform")
        zero = jnp.zeros((), jnp.int32)
        return UniformState(zero, zero, order(rng, zero), jnp.copy(rng))

    def draw(state: UniformState) -> tuple[Array, UniformState, Metrics]:
        places, end = state.drawn + jnp.arange(batch_size, dtype=jnp.int32), state.drawn + batch_size
        ends = end >= num_rows
        following = jax.lax.cond(ends, lambda: order(state.rng, state.epoch + 1), lambda: state.order)
        rows = jnp.where(places < num_rows, state.order[places % num_rows], following[places % num_rows])
        state = UniformState(jnp.where(ends, end - num_rows, end), state.epoch + ends, following, state.rng)
        return rows, state, weight_metrics(jnp.zeros(num_rows))

    return Sampler(init, draw, num_rows, batch_size)


class ReplayedState(NamedTuple):
    """State of `replayed`."""

    step: Array
    """int32 scalar: draws made."""
    sequence: Array
    """int32 `[steps, b]`."""


def replayed(sequence: Any, num_rows: int, *, num_steps: int | None = None) -> Sampler:
    """Draw what another run drew, step by step.

    After the last row of the sequence the first follows again.

    Args:
      sequence: integers `[steps, b]`: the row numbers of each step, as the metric `selected` of a sampled run; −1 at places
        without a row, never the first of a step.
      num_rows: N, of the data that the sequence was drawn from.
      num_steps: how many steps will be asked for; None does not check that the sequence has as many.

    Raises:
      UserError: for a sequence of another shape or type, rows outside the data, or too few steps.

    Reference: RLSampler, section 6.1 ("samples only").
    """
    rows = jnp.asarray(sequence)
    if rows.ndim != 2 or not rows.size or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise UserError(
            f"The sequence has the shape {rows.shape} and the type {rows.dtype}; it must be integers [steps, batch_size]."
        )
    if int(rows.min()) < -1 or int(rows[:, 0].min()) < 0 or int(rows.max()) >= num_rows:
        raise UserError(
            f"The sequence holds the row numbers {int(rows.min())} to {int(rows.max())}, but num_rows={num_rows}: "
            "give the data that it was drawn from."
        )
    if num_steps is not None and num_steps > rows.shape[0]:
        raise UserError(
            f"The sequence has {rows.shape[0]} steps, and {num_steps} are asked for: ask for fewer, or give a longer one."
        )

    def init(rng: Array, params: Any = None) -> ReplayedState:
        del rng
        _refuse(params, "replayed")
        return ReplayedState(jnp.zeros((), jnp.int32), jnp.array(rows, jnp.int32))

    def draw(state: ReplayedState) -> tuple[Array, ReplayedState, Metrics]:
        return state.sequence[state.step % rows.shape[0]], state._replace(step=state.step + 1), {}

    return Sampler(init, draw, num_rows, rows.shape[1], pads=int(rows.min()) < 0)


def _refuse(params: Any, name: str) -> None:
    if params is not None:
        raise UserError(f"The sampler {name} has no parameters: omit params.")
