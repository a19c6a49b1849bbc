"""Meshes and shardings: one step for one device, many, and many processes.

The step is an ordinary jitted function of global arrays; only where the arrays lie differs. Rows are spread over the mesh. The
state is replicated, or spread too when it would not fit on one device:

    mesh = make_mesh()
    train = make_step(…, mesh=mesh)                       # rows that the filter picks are spread too
    where = split_state(mesh, jax.eval_shape(init))
    state = jax.jit(init, out_shardings=where)()          # no device ever holds all of it
    train = train.map(keep_sharding(where))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel import trees
from bilevel.types import Batch, UserError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of one axis, "data", over `devices` (None: all of all processes).

    Its axis is of type Auto: explicit axes refuse `top_k` over a sharded batch.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that spreads the leading axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def everywhere(mesh: Mesh) -> NamedSharding | None:
    """Return `replicated(mesh)`; None, which leaves jax its default, for a mesh of one device."""
    return replicated(mesh) if mesh.size > 1 else None


def check_divides(mesh: Mesh, **sizes: int) -> None:
    """Reject batch sizes that the mesh does not divide.

    Raises:
      UserError: naming the first such size.
    """
    for name, size in sizes.items():
        if size % mesh.size:
            raise UserError(
                f"{name}={size} cannot be divided among {mesh.size} devices: choose a multiple of {mesh.size}."
            )


def batch_specs(batch: Batch, axis_name: str = DATA_AXIS) -> Any:
    """Return the specs of a batch, for `shard_map`.

    Its rows are spread over the axis, and all that is `Shared` is everywhere.

    Args:
      batch: arrays, or their shapes.
      axis_name: of the mesh.

    Returns:
      A tree of `PartitionSpec` for the arrays of the batch.
    """
    return trees.map_rows(
        lambda _: PartitionSpec(axis_name), batch, lambda node: jax.tree.map(lambda _: PartitionSpec(), node)
    )


def place_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Make global arrays, spread over the mesh, of this process's rows.

    What is `Shared` lies whole on every device; every process gives the same arrays.

    Raises:
      UserError: if the devices of this process do not divide its rows.
    """
    for x in jax.tree.leaves(trees.without_shared(batch)[0]):
        check_divides(mesh.local_mesh, rows=len(x))

    def place(x: Any, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), np.asarray(x))

    return jax.tree.map(place, batch, batch_specs(batch))


def batch_placer(mesh: Mesh) -> Callable[[Batch], Batch]:
    """Return what places host batches on the mesh, for `bilevel.training.Data`."""
    return functools.partial(place_batch, mesh) if mesh.size > 1 else jax.device_put


def split_state(mesh: Mesh, state: Any, *, min_size: int = 1 << 14) -> Any:
    """Decide where the arrays of a state lie when it is spread over the mesh.

    Parameters, optimizer states and a method's v are treated alike.

    Every array of at least `min_size` elements is split along its longest axis that the mesh divides (the first of several);
    smaller ones, those that no axis fits and random keys stay whole on every device. XLA gathers a parameter where it is
    used and scatters its gradient (as in ZeRO, stage 3).

    Args:
      mesh: from `make_mesh`.
      state: a `TrainState`, or its shapes from `jax.eval_shape`.
      min_size: elements of the smallest array that is worth splitting.

    Returns:
      A tree of `NamedSharding`.
    """

    def leaf(x: Any) -> NamedSharding:
        fitting = [i for i, n in enumerate(x.shape) if n % mesh.size == 0]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or np.prod(x.shape) < min_size or not fitting:
            return replicated(mesh)
        axis = max(fitting, key=lambda i: (x.shape[i], -i))
        return NamedSharding(mesh, PartitionSpec(*[DATA_AXIS if i == axis else None for i in range(len(x.shape))]))

    return jax.tree.map(leaf, state)


def keep_sharding(where: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper for `TrainStep.map` that keeps the state where it lies.

    `where` is from `split_state`.
    """

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*arguments: Any) -> Any:
            state, metrics = function(*arguments)
            return jax.lax.with_sharding_constraint(state, where), metrics

        return kept

    return wrapper


def placed(mesh: Mesh, step: Any, create: Callable[..., Any], *arguments: Any, split: bool) -> tuple[Any, Any]:
    """Make a state on all devices of the mesh.

    Args:
      mesh: from `make_mesh`.
      step: a `TrainStep`.
      create: arrays -> the state; jitted here.
      *arguments: these arrays.
      split: whether the state is spread over the devices, instead of whole on each.

    Returns:
      The state, and the step that keeps it where it lies.
    """
    if not split:
        return jax.jit(create, out_shardings=everywhere(mesh))(*arguments), step
    where = split_state(mesh, jax.eval_shape(create, *arguments))
    return jax.jit(create, out_shardings=where)(*arguments), step.map(keep_sharding(where))


def place_tree(mesh: Mesh, tree: Any, *, split: bool) -> Any:
    """Copy arrays of the host to the devices: whole to each, or split as `split_state` says, each device its part alone."""
    return jax.device_put(tree, split_state(mesh, tree) if split else everywhere(mesh))


def spread_rows(batch: Any, mesh: Mesh | None) -> Any:
    """Spread the rows of a batch over all devices of the mesh; under plain `jit`.

    What is `Shared` lies whole on each.
    """
    if mesh is None:
        return batch
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return trees.map_rows(lambda x: jax.lax.with_sharding_constraint(x, rows), batch, lambda node: gather(node, mesh))


def gather(tree: Any, mesh: Mesh | None, chosen: Callable[[str], bool] | None = None) -> Any:
    """Make the arrays whole on every device of the mesh; under plain `jit`.

    Args:
      tree: arrays.
      mesh: the devices; None changes nothing.
      chosen: path ("block_1/mlp/kernel") -> whether that array is gathered; None: all of them.
    """
    if mesh is None:
        return tree
    everywhere = replicated(mesh)

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        if chosen is not None and not chosen(jax.tree_util.keystr(path, simple=True, separator="/")):
            return x
        return jax.lax.with_sharding_constraint(x, everywhere)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Copy the arrays whole to every device.

    With several processes all of them must call it.
    """
    if all(x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def local(tree: Any) -> Any:
    """Take this process's copies of replicated arrays, for what every process does for itself."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def start_processes(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Join this process to a multi-process run, before anything else touches jax.

    Without arguments the cluster environment (SLURM, Cloud TPU, …) is asked. On CPU the collectives go through gloo.

    Args:
      coordinator: "host:port" of process 0.
      count: number of processes.
      index: this process, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, count, index)
