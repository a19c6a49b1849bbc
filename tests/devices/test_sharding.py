"""One device = eight devices under jit = eight under shard_map = two processes, within float reassociation."""

import socket
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_run as run
import toy
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.selection import filters
from bilevel.types import UserError

SAME = 1e-4


def values(state: bilevel.TrainState) -> np.ndarray:
    return toy.flat((state.params, state.weight_params, state.method_state.v))


@cache
def alone(**options: Any) -> bilevel.TrainState:
    return run.on_mesh(sharding.make_mesh(jax.devices()[:1]), **options)


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_eight_devices_under_jit(derivatives: Any) -> None:
    exact = isinstance(derivatives, bilevel.Forward)
    wanted = alone() if exact else alone(derivatives=derivatives)
    spread = run.on_mesh(sharding.make_mesh(), derivatives=derivatives)
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    assert toy.relative_error(values(spread), values(wanted)) < (SAME if exact else 2e-2)


def in_shard_map(check_vma: bool, **options: Any) -> bilevel.TrainState:
    train, mesh = run.build(axis_name="data", **options), sharding.make_mesh()
    rows, same = PartitionSpec("data"), PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            lambda *a: train.step(*a)[0],
            mesh=mesh,
            in_specs=(same, rows, rows),
            out_specs=same,
            check_vma=check_vma,
        )
    )
    state = run.start(train)
    for i in range(run.STEPS):
        state = step(state, *run.batches(i))
    return state


@pytest.mark.parametrize(("check_vma", "estimator"), [(False, "softmax"), (True, "score")])
def test_shard_map_with_an_axis_name(check_vma: bool, estimator: str) -> None:
    spread = in_shard_map(check_vma, estimator=estimator)
    wanted = alone() if estimator == "softmax" else alone(estimator=estimator)
    assert toy.relative_error(values(spread), values(wanted)) < SAME


def test_specs_of_the_metrics_under_shard_map() -> None:
    train, mesh = run.build(axis_name="data"), sharding.make_mesh()
    rows, same = PartitionSpec("data"), PartitionSpec()
    state, names = run.start(train), jax.eval_shape(run.build().step, run.start(train), *run.batches(0))[1]
    specs = {name: rows if metric.ndim else same for name, metric in names.items()}
    step = jax.shard_map(train.step, mesh=mesh, in_specs=(same, rows, rows), out_specs=(same, specs), check_vma=False)
    metrics = jax.jit(step)(state, *run.batches(0))[1]
    assert {name: metric.shape for name, metric in metrics.items()} == {n: m.shape for n, m in names.items()}
    assert len(set(metrics["selected"].tolist())) == names["selected"].size


@pytest.mark.parametrize("scope", ["global", "local"])
def test_positions_of_rows_that_are_all_taken(scope: Any) -> None:
    """Those of the whole batch, or of the device's own part."""
    rule = bilevel.filters.gumbel_top_k(scope=scope)
    kinds: list[tuple[Any, Any]] = [("dense", bilevel.frozen()), ("sparse", bilevel.uniform())]
    for mode, method in kinds:
        train = bilevel.make_step(
            toy.loss,
            toy.weighting,
            optax.sgd(0.1),
            None,
            method,
            mode=mode,
            batch_size=8,
            filter=rule,
            axis_name="data",
        )
        state, rows = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2)), PartitionSpec("data")
        mapped = jax.shard_map(
            lambda *a, train=train: train.step(*a)[1]["selected"],
            mesh=sharding.make_mesh(jax.devices()[:2]),
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=rows,
            check_vma=False,
        )
        found = jax.jit(mapped)(state, toy.arrays(0, 8), toy.arrays(1, 4)).tolist()
        assert found == [*range(8)], mode


def in_pmap(**options: Any) -> bilevel.TrainState:
    train = run.build(axis_name="i", **options)
    step = jax.pmap(lambda *a: train.step(*a)[0], axis_name="i", in_axes=(None, 0, 0), out_axes=None)
    state = run.start(train)
    for i in range(run.STEPS):
        state = step(state, *[jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), b) for b in run.batches(i)])
    return state


@pytest.mark.slow
def test_pmap_with_an_axis_name() -> None:
    assert toy.relative_error(values(in_pmap()), values(alone())) < SAME


SPREAD = {
    "jit": lambda **options: run.on_mesh(sharding.make_mesh(), **options),
    "shard_map": partial(in_shard_map, False),
    "shard_map, checked": partial(in_shard_map, True),
    "pmap": in_pmap,
}


# Not Adam: its first update does not depend on the size of the gradient, so that all alignments of DDS are rounding.
MOMENTUM = optax.sgd(0.01, momentum=0.9)


def in_last(path: str) -> bool:
    return path.startswith("last")


LAST_LAYER: dict[str, Any] = {
    "dds, forward": (bilevel.dds(), bilevel.Forward()),
    "dds, finite": (bilevel.dds(), bilevel.Finite(1e-2)),
    "soba, finite": (bilevel.soba(optax.sgd(0.05)), bilevel.Finite(1e-2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("name", LAST_LAYER)
def test_probes_in_the_last_layer(how: str, name: str) -> None:
    """The forward pass below it is evaluated apart from the rest."""
    method, derivatives = LAST_LAYER[name]
    options = {"method": method, "derivatives": derivatives, "param_filter": in_last}
    options["optimizer"] = MOMENTUM
    found, wanted = SPREAD[how](**options), alone(**options)
    error = toy.relative_error(
        toy.flat((found.params, found.weight_params)), toy.flat((wanted.params, wanted.weight_params))
    )
    assert error < (SAME if isinstance(derivatives, bilevel.Forward) else 2e-2)


def test_local_filters_move_no_rows() -> None:
    """Each device filters its own rows: the rows of the θ-update come in equal numbers from every device."""
    rule = filters.gumbel_top_k(scope="local", shards=8)
    train = run.build(filter=rule)
    state = run.start(train)
    _, metrics = jax.jit(train.step)(state, *run.batches(0))
    owners = np.asarray(metrics["selected"]) // (run.BIG // 8)
    assert np.bincount(owners, minlength=8).tolist() == [run.SMALL // 8] * 8
    moved = in_shard_map(False, filter=filters.gumbel_top_k(scope="local"))
    assert np.isfinite(values(moved)).all()


def test_rows_of_the_alpha_gradient_come_from_all_shards_too() -> None:
    """A weight of its own for each row: those that move are the rows of the α-gradient."""
    train = bilevel.make_step(
        toy.loss, lambda wp, batch: wp[batch["row"]], optax.sgd(0.1), optax.sgd(1.0), bilevel.dds(), batch_size=8,
        filter=filters.gumbel_top_k(scope="local", shards=8), alpha_batch="uniform", alpha_batch_size=16,
    )  # fmt: skip
    big = toy.arrays(0, run.BIG) | {"row": jnp.arange(run.BIG)}
    weights = jnp.zeros(run.BIG)
    state, _ = jax.jit(train.learn)(train.init(jax.random.key(3), toy.params(1), weights), big, toy.arrays(100, 8))
    moved = np.flatnonzero(np.asarray(state.weight_params))
    assert np.bincount(moved // (run.BIG // 8), minlength=8).tolist() == [2] * 8


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).parents[1] / "toys" / "sharded_run.py"
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [start([sys.executable, str(script), port, "2", str(i)]) for i in range(2)]
    outputs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    found = [next(line for line in out.splitlines() if line.startswith("RESULT")) for out, _ in outputs]
    assert found[0] == found[1]
    numbers = np.asarray([float.fromhex(x) for x in found[0].split()[1:]])
    state = alone()
    assert toy.relative_error(numbers, toy.flat((state.params, state.weight_params))) < SAME


def test_sizes_that_the_mesh_does_not_divide() -> None:
    with pytest.raises(UserError, match="batch_size=12 cannot be divided among 8 devices: choose a multiple of 8"):
        sharding.check_divides(sharding.make_mesh(), batch_size=12)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_rows_reported_are_those_trained_on(scope: Any) -> None:
    """Positions in the big batch of all devices, whichever part of it a device chose from."""
    mesh, rows, same = sharding.make_mesh(jax.devices()[:2]), PartitionSpec("data"), PartitionSpec()

    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return (batch["x"] @ params) ** 2, bilevel.LossAux(model_state, {"id": batch["id"].astype(jnp.float32)})

    train = bilevel.make_step(
        loss, lambda wp, batch: batch["x"] @ wp, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(),
        batch_size=4, filter=filters.top_k(scope=scope), estimator="softmax", row_metrics=("id",), axis_name="data",
    )  # fmt: skip
    batch = {"x": jax.random.normal(jax.random.key(1), (16, 3)), "id": jnp.arange(16)}
    state = train.init(jax.random.key(0), jnp.ones(3), jnp.ones(3))
    mapped = jax.shard_map(
        lambda *a: {name: train.step(*a)[1][name] for name in ("selected", "id", "ids")},
        mesh=mesh, in_specs=(same, rows, rows), out_specs=rows, check_vma=False,
    )  # fmt: skip
    found = jax.jit(mapped)(state, batch, batch)
    assert found["selected"].tolist() == found["id"].tolist() == found["ids"].tolist()


def test_rows_that_a_mesh_does_not_divide_are_refused() -> None:
    mesh = sharding.make_mesh(jax.devices()[:4])
    with pytest.raises(UserError, match="rows=6 cannot be divided among 4 devices"):
        sharding.place_batch(mesh, {"x": np.zeros((6, 2))})


def test_the_model_state_keeps_its_types() -> None:
    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return (batch["x"] @ params) ** 2, bilevel.LossAux({"mean": model_state["mean"].astype(jnp.float32) + 1}, {})

    train = bilevel.make_step(
        loss, lambda wp, batch: batch["x"] @ wp, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(), batch_size=4
    )
    batch = {"x": jnp.ones((16, 3))}
    state = train.init(jax.random.key(0), jnp.ones(3), jnp.ones(3), {"mean": jnp.zeros((), jnp.bfloat16)})
    state, _ = jax.lax.scan(lambda state, _: (train.step(state, batch, batch)[0], None), state, None, length=2)
    assert state.model_state["mean"].dtype == jnp.bfloat16
    assert float(state.model_state["mean"]) == 2
