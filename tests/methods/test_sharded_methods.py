"""Implicit differentiation, Meta-Weight-Net and learning to reweight: the same on one device and on eight."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
import sharded_run as run
import toy
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.selection import filters

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

SAME = 1e-4
MWN = bilevel.meta_weight_net(toy.loss, hidden=8)
METHODS: dict[str, Any] = {
    "implicit cg": lambda: bilevel.implicit_cg(damping=300.0, warm_start=True),
    "implicit neumann": lambda: bilevel.implicit_neumann(step_size=0.003, damping=1.0, average_specific=0.5),
    "meta-weight-net": lambda: bilevel.dds(),
    "meta-weight-net, dense": lambda: bilevel.dds(),
    "learning to reweight": bilevel.learning_to_reweight,
}


def build(name: str, **options: Any) -> bilevel.TrainStep:
    weighting: Any = MWN.scorer if name.startswith("meta") else toy.weighting
    if name == "learning to reweight":
        weighting = None
    if name.endswith(("dense", "reweight")):
        options |= {"mode": "dense", "batch_size": run.BIG}
    else:
        options |= {"batch_size": run.SMALL, "update_every": 2}
    weight_optimizer = None if weighting is None else optax.sgd(0.01)
    options.setdefault("derivatives", bilevel.Forward())
    # Not Adam: its first update does not depend on the size of the gradient, so that all alignments are rounding.
    optimizer = optax.sgd(0.01, momentum=0.9)
    return bilevel.make_step(toy.loss, weighting, optimizer, weight_optimizer, METHODS[name](), **options)


def start(name: str, train: bilevel.TrainStep) -> bilevel.TrainState:
    alpha: Any = toy.weight_params(2)
    if name.startswith("meta"):
        alpha = MWN.init(jax.random.key(3))
    return train.init(jax.random.key(0), toy.params(1), None if name == "learning to reweight" else alpha)


METRICS = ("effective_sample_size", "weight_entropy")


def after(name: str, train: bilevel.TrainStep, step: Any, place: Any = lambda batch: batch) -> np.ndarray:
    state, metrics = start(name, train), {}
    for i in range(4):
        state, metrics = step(state, *map(place, run.batches(i)))
    size = np.asarray([metrics["effective_sample_size"], metrics["weight_entropy"]])
    return toy.flat((state.params, state.weight_params, state.method_state, size))


def mapped(train: bilevel.TrainStep, check_vma: bool) -> Any:
    rows, same = PartitionSpec("data"), PartitionSpec()

    def scalars(*arguments: Any) -> Any:
        state, metrics = train.step(*arguments)
        # What comes from gathered scores is the same everywhere, but shard_map cannot prove it.
        return (state,) if check_vma else (state, {k: metrics[k] for k in METRICS})

    specs: dict[str, Any] = {"in_specs": (same, rows, rows), "out_specs": same, "check_vma": check_vma}
    return jax.jit(jax.shard_map(scalars, mesh=sharding.make_mesh(), **specs))


@pytest.mark.parametrize("name", METHODS)
def test_eight_devices(name: str) -> None:
    alone = build(name)
    wanted = after(name, alone, jax.jit(alone.step))
    mesh = sharding.make_mesh()
    spread = build(name, mesh=mesh)
    found = after(name, spread, jax.jit(spread.step), lambda batch: sharding.place_batch(mesh, batch))
    assert toy.relative_error(found, wanted) < SAME
    axis = build(name, axis_name="data")
    assert toy.relative_error(after(name, axis, mapped(axis, False)), wanted) < SAME


@pytest.mark.parametrize("name", METHODS)
def test_replication_is_proved(name: str) -> None:
    """shard_map's own check accepts the step, by differences as well."""
    for derivatives in (bilevel.Forward(), bilevel.Finite()):
        train = build(name, axis_name="data", derivatives=derivatives)
        step = mapped(train, True)
        jax.eval_shape(step, start(name, train), *run.batches(0))


def test_local_filter_takes_features_along() -> None:
    train = build("meta-weight-net", axis_name="data", filter=filters.gumbel_top_k(scope="local"))
    assert np.isfinite(after("meta-weight-net", train, mapped(train, False))).all()
