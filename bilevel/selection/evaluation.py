"""How a model is evaluated for scores alone: its statistics and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError

Statistics: TypeAlias = Literal["batch", "running"]


def scoring_loss(make: Callable[[bool], LossFn], *, statistics: Statistics = "batch", dtype: Any = None) -> LossFn:
    """Make the loss that scores rows like the one that θ is trained on.

        scorer = scoring.rho_loss(scoring_loss(lambda train: classification_loss(net, train=train)))

    Neither choice moves the statistics that the model keeps: only the θ-update does, by the rows it trains on.

    Args:
      make: whether to be in training mode -> the loss. Training mode also draws dropout and augmentation.
      statistics: what BatchNorm normalises a scored row by. "batch": the statistics of the rows scored with it, the big batch
        (of a device, or each of its `micro_batches`); "running": the averages that the model keeps. Which is better depends on
        the data: try both.
      dtype: type of the scoring forward pass, such as `jnp.bfloat16`; None changes nothing. Floating-point parameters and rows
        are cast to it, statistics are not. A Flax network whose layers name a dtype casts back: give `make` the network with
        `dtype=` that type instead, it has the same parameters.

    Raises:
      UserError: for statistics that are neither.

    Reference: RHO-LOSS, section 4 ("time-efficient data selection") on low precision.
    """
    if statistics not in ("batch", "running"):
        raise UserError(f'statistics="{statistics}" is unknown: choose "batch" or "running".')
    loss = make(statistics == "batch")
    return loss if dtype is None else _in_type(loss, dtype)


def _in_type(loss: LossFn, dtype: Any) -> LossFn:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def narrow(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        return loss(cast(params), model_state, cast(batch), rng)

    return narrow
