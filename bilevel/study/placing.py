"""Where the state of a run lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.step import TrainStep
from bilevel.study.config import Study


def placed(
    study: Study, mesh: Mesh, step: TrainStep, create: Callable[..., TrainState], *arguments: Any
) -> tuple[TrainState, TrainStep]:
    """Return the state that `create` makes, on all devices of the mesh, and the step that keeps it where it lies."""
    if not study.shard_state:
        where = sharding.replicated(mesh) if mesh.size > 1 else None
        return jax.jit(create, out_shardings=where)(*arguments), step
    where = sharding.split_state(mesh, jax.eval_shape(create, *arguments))
    return jax.jit(create, out_shardings=where)(*arguments), step.map(sharding.keep_sharding(where))
