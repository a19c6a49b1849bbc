"""Meshes and shardings: the same step on one device, many devices and many processes.

The step is an ordinary jitted function of global arrays; only where the arrays lie differs. Rows are spread over the mesh,
the state is replicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel.types import Batch, UserError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "data", over `devices` (all devices of all processes by default).

    Its axis is of type Auto: explicit axes refuse `top_k` over a sharded batch.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis spread over the mesh."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divides(mesh: Mesh, **sizes: int) -> None:
    """Refuses batch sizes that the mesh does not divide.

    Raises:
      UserError: naming the first such size.
    """
    for name, size in sizes.items():
        if size % mesh.size:
            raise UserError(
                f"{name}={size} cannot be divided among {mesh.size} devices: choose a multiple of {mesh.size}."
            )


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """This process's rows -> global arrays with their rows spread over the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def place_state(mesh: Mesh, state: Any) -> Any:
    """The same state on every device. Every process must hold the same values.

    Better still, create the state there: `jax.jit(init, out_shardings=replicated(mesh))`.
    """
    sharding = replicated(mesh)

    def leaf(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(np.asarray(x), sharding)

    return jax.tree.map(leaf, state)


def start_processes(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins this process to a multi-process run; call it before anything else touches jax.

    Without arguments the cluster environment (SLURM, Cloud TPU, …) is asked. On CPU the collectives go through gloo.

    Args:
      coordinator: "host:port" of process 0.
      count: number of processes.
      index: this process, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, count, index)
