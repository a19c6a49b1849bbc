"""Arrays of a batch without rows: the same update on one device, on eight, in micro-batches and along a mapped axis."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import PartitionSpec

import bilevel
from bilevel import trees
from bilevel.devices import sharding
from bilevel.types import Shared, UserError

BIG, SMALL, SPECIFIC, STEPS, NEGATIVES = 64, 16, 8, 2, 5
"""Negatives that no number of devices divides, and that are fewer than a part's rows."""


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    """Each row against all negatives, whose features have today's θ."""

    def features(x: Any) -> Any:
        return jnp.tanh(x @ p["first"]["kernel"])

    negatives = batch["negatives"].arrays
    scores = features(batch["x"]) @ (features(negatives["x"]) * p["last"]["kernel"]).T
    scores = jnp.where(negatives["number"] == batch["number"][:, None], -jnp.inf, scores)
    return jax.nn.logsumexp(scores, axis=1) + batch["y"], bilevel.LossAux(model_state, {})


def batch_of(seed: int, rows: int) -> Any:
    numbers = jnp.arange(rows) % 7
    negatives = {"x": toy.arrays(seed + 500, NEGATIVES)["x"], "number": jnp.arange(NEGATIVES)}
    return {**toy.arrays(seed, rows), "number": numbers, "negatives": Shared(negatives)}


def build(**options: Any) -> tuple[bilevel.TrainStep, bilevel.TrainState]:
    train = bilevel.make_step(
        loss, toy.weighting, optax.sgd(0.1), optax.adam(0.01), bilevel.soba(optax.sgd(0.05)), batch_size=SMALL,
        update_every=1, derivatives=bilevel.Forward(), **options,
    )  # fmt: skip
    return train, train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))


def after(step: Any, state: Any, place: Callable[[Any], Any] = lambda batch: batch) -> np.ndarray:
    for i in range(STEPS):
        state = step(state, place(batch_of(i, BIG)), place(batch_of(100 + i, SPECIFIC)))
    return toy.flat((state.params, state.weight_params, state.method_state.v))


def in_parts(**options: Any) -> np.ndarray:
    train, state = build(**options)
    return after(jax.jit(lambda *a: train.step(*a)[0]), state)


@cache
def alone() -> np.ndarray:
    return in_parts()


def on_a_mesh() -> np.ndarray:
    mesh = sharding.make_mesh()
    train, state = build(mesh=mesh)
    place = sharding.batch_placer(mesh)
    placed = place(batch_of(0, BIG))
    assert placed["negatives"].arrays["x"].sharding.is_fully_replicated
    assert not placed["x"].sharding.is_fully_replicated
    state = jax.device_put(state, sharding.replicated(mesh))
    return after(jax.jit(lambda *a: train.step(*a)[0]), state, place)


def along_an_axis(check_vma: bool, **options: Any) -> np.ndarray:
    train, state = build(axis_name="data", **options)
    same = PartitionSpec()
    step = jax.shard_map(
        lambda *a: train.step(*a)[0],
        mesh=sharding.make_mesh(),
        in_specs=(same, *(sharding.batch_specs(batch_of(0, rows)) for rows in (BIG, SPECIFIC))),
        out_specs=same,
        check_vma=check_vma,
    )
    return after(jax.jit(step), state)


WAYS: dict[str, Callable[[], np.ndarray]] = {
    "micro-batches": lambda: in_parts(micro_batches=4),
    "eight devices": on_a_mesh,
    "a mapped axis": lambda: along_an_axis(False),
    "a checked mapped axis": lambda: along_an_axis(True),
    "local filters": lambda: in_parts(filter=bilevel.filters.gumbel_top_k(scope="local")),
}


@pytest.mark.parametrize("way", WAYS)
def test_same_update(way: str) -> None:
    assert toy.relative_error(WAYS[way](), alone()) < 1e-4


def test_rows_are_counted_and_taken_without_it() -> None:
    batch = batch_of(0, 6)
    assert trees.num_rows(batch) == 6
    taken = trees.take(batch, jnp.asarray([4, 1]))
    np.testing.assert_array_equal(taken["x"], batch["x"][jnp.asarray([4, 1])])
    assert taken["negatives"] is batch["negatives"]
    rows, join = trees.without_shared(batch)
    assert rows["negatives"] is None
    assert join(rows)["negatives"] is batch["negatives"]
    with pytest.raises(
        UserError, match=r"found no arrays: make them equal, or mark what belongs to no row as bilevel.Shared"
    ):
        trees.num_rows(Shared(jnp.zeros(3)))
    with pytest.raises(UserError, match=r"\['table'\]: 5.*bilevel.Shared"):
        trees.num_rows({**toy.arrays(0, 6), "table": jnp.zeros(5)})


def test_devices_must_divide_the_rows_but_not_what_is_shared() -> None:
    mesh = sharding.make_mesh(jax.devices()[:4])
    sharding.place_batch(mesh, batch_of(0, 8))
    with pytest.raises(UserError, match="rows=6 cannot be divided among 4 devices"):
        sharding.place_batch(mesh, batch_of(0, 6))
