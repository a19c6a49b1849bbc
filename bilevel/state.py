"""The training state: one immutable pytree that holds all that a step reads and writes."""

from __future__ import annotations

from typing import Any

import optax
from flax import struct

from bilevel.types import Array, ModelState, Params


@struct.dataclass
class TrainState:
    """All that changes while training. A pytree: it can be donated, sharded, saved and compared leaf by leaf."""

    step: Array
    """int32 scalar: the number of θ-updates done."""
    params: Params
    """θ, the parameters of the main model."""
    model_state: ModelState
    """BatchNorm statistics and the like; `{}` when there are none. Changed once a step, by the θ-update's evaluation."""
    opt_state: optax.OptState
    """State of the optimizer of θ."""
    weight_params: Params
    """α, the parameters of the weighting network."""
    weight_opt_state: optax.OptState
    """State of the optimizer of α. Changed on α-steps only."""
    method_state: Any
    """What the method keeps between α-steps (SOBA: v and the state of its optimizer)."""
    ema: Any
    """Exponential moving average of (params, model_state), or None when it is not kept."""
    rng: Array
    """A typed key (`jax.random.key`). It never changes: step t draws from `fold_in(rng, t)`."""
    uses: Any = None
    """How often each row was trained on, uint8 `[N]`, or None when nothing is capped. See `bilevel.MaxUses`."""
