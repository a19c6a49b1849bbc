"""Samplers pick the rows of a θ-update by number, before anything is loaded.

One iteration of a sampler that learns: `draw` the numbers, train on the rows, `observe` what the model gave for them or
`observe_gradient` what moved it; every `reward_every` iterations `reward` with the validation loss (or `reward_gradient` with its
gradient), every `update_every` `learn` (after the reward, if both are due); or both when `due` says so.
`bilevel.make_sampled_step` does all this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevel.types import Array, Metrics, Params, UserError


class Sampler(NamedTuple):
    """A sampler: pure functions over a state.

    Hyper-parameters live in the closure, arrays in the state.
    """

    init: Callable[..., Any]
    """`init(rng, params=None) -> state`; `params` are what another run learned (None: begin anew). Fixes all shapes."""
    draw: Callable[[Any], tuple[Array, Any, Metrics]]
    """State -> (row numbers int32 `[b]`, state, float32 scalars on the distribution that they were drawn from). With `pads`, −1
    stands at places without a row."""
    num_rows: int
    """N, rows to draw from."""
    batch_size: int
    """b, rows in one draw."""
    observe: Callable[[Any, Array], Any] | None = None
    """(state, the model's outputs for the rows drawn `[b, …]`) -> state. None if the sampler does not look at the model."""
    reward: Callable[[Any, Array], tuple[Any, Metrics]] | None = None
    """(state, mean validation loss) -> (state, float32 scalars). None if the sampler needs none."""
    learn: Callable[[Any], tuple[Any, Metrics]] | None = None
    """State -> (state, float32 scalars). None if the sampler never changes."""
    reward_every: int = 1
    update_every: int = 1
    pads: bool = False
    """Whether draws may have places without a row, never the first one. The θ-update's loss is the mean over the others."""
    observe_gradient: Callable[[Any, Params], Any] | None = None
    """(state, the gradient of the θ-update) -> state. None if the sampler does not look at it."""
    reward_gradient: Callable[[Any, Params], tuple[Any, Metrics]] | None = None
    """(state, the gradient of the mean validation loss after the θ-update) -> (state, float32 scalars), instead of `reward`."""
    due: Callable[[Any], Array] | None = None
    """State -> bool scalar: whether reward and update are due after this iteration, for a sampler whose rounds differ in length.
    None: every `reward_every` and `update_every` iterations."""


def check_sizes(num_rows: int, batch_size: int) -> None:
    """Reject a sampler without rows, or one whose draws are empty."""
    if num_rows < 1 or batch_size < 1:
        raise UserError(f"num_rows={num_rows} and batch_size={batch_size} must both be at least 1.")
