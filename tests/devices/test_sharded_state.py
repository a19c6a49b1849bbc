"""State spread over the devices: the same numbers, an eighth of the memory for it."""

import dataclasses
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
from bilevel.nn.transformer import Transformer, TransformerConfig, gathered_before, language_model_loss

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

METHODS: dict[str, Any] = {
    "dds": lambda: bilevel.dds(average_specific=0.9),
    "anograd": bilevel.anograd,
    "soba": lambda: bilevel.soba(optax.adam(0.05)),
}


def toy_step(method: str, mesh: Any = None) -> bilevel.TrainStep:
    return bilevel.make_step(
        toy.loss, toy.weighting, optax.adam(0.01), optax.adam(0.01), METHODS[method](), batch_size=run.SMALL,
        update_every=2, derivatives=bilevel.Forward(), mesh=mesh,
    )  # fmt: skip


def start(train: bilevel.TrainStep) -> bilevel.TrainState:
    """Hidden units as many as devices, so that there is something to split."""
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (toy.FEATURES, 16)}, "last": {"kernel": (16,)}}
    p = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return train.init(jax.random.key(0), p, toy.weight_params(2))


@pytest.mark.parametrize("method", METHODS)
def test_same_numbers_as_on_one_device(method: str) -> None:
    mesh = sharding.make_mesh()
    train, other = toy_step(method, mesh), toy_step(method)
    alone = start(other)
    where = sharding.split_state(mesh, jax.eval_shape(lambda: start(train)), min_size=16)
    assert where.params["first"]["kernel"].spec == PartitionSpec(None, "data")
    assert where.params["last"]["kernel"].spec == PartitionSpec("data")
    assert where.weight_params["w"].spec == PartitionSpec()  # 5 features are not divided by 8
    spread = jax.jit(lambda: start(train), out_shardings=where)()
    step = jax.jit(other.step)
    traced = []

    def counted(*arguments: Any) -> Any:
        traced.append(1)
        return train.map(sharding.keep_sharding(where)).step(*arguments)

    kept = jax.jit(counted, donate_argnums=0)
    for i in range(run.STEPS):
        alone, _ = step(alone, *run.batches(i))
        spread, _ = kept(spread, *(sharding.place_batch(mesh, batch) for batch in run.batches(i)))
    assert len(traced) == 1  # the state came back as it went in
    for x, w in zip(jax.tree.leaves(spread), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(w, x.ndim)
    whole = sharding.whole(mesh, spread.params)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(whole))
    # A random reduction order of the eight devices' sums, through five steps of Adam.
    assert toy.relative_error(whole, alone.params) < 1e-4
    assert toy.relative_error(spread.weight_params, alone.weight_params) < 1e-3


def transformer_step(model: Transformer, method: Any, mesh: Any, **options: Any) -> tuple[bilevel.TrainStep, Any]:
    """The step of a transformer, and what makes its state."""
    train = bilevel.make_step(
        language_model_loss(model), lambda wp, batch: batch["tokens"].astype(jnp.float32) @ wp, optax.adam(1e-3),
        optax.adam(1e-3), method, batch_size=16, update_every=1, mesh=mesh if mesh.size > 1 else None, **options,
    )  # fmt: skip

    def init() -> bilevel.TrainState:
        params: Any = model.init(jax.random.key(1), jnp.zeros((1, 32), jnp.uint8))["params"]
        return train.init(jax.random.key(0), params, jnp.zeros(32))

    return train, init


def language_model(method: Any, mesh: Any, split: bool, model: Transformer | None = None, **options: Any) -> Any:
    """A compiled step with α-work of a small transformer."""
    model = model or Transformer(TransformerConfig(layers=2, width=256, heads=4, feed_forward=1024, remat=True))
    train, init = transformer_step(model, method, mesh, **options)
    shapes = jax.eval_shape(init)
    where = sharding.split_state(mesh, shapes, min_size=1 << (14 if split else 40))
    train, rows = train.map(sharding.keep_sharding(where)), sharding.row_sharding(mesh)

    def placed(x: Any, at: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    def batch(count: int) -> Any:
        found = {"tokens": jnp.zeros((count, 32), jnp.uint8), "length": jnp.zeros(count, jnp.int32)}
        return jax.tree.map(lambda x: placed(x, rows), found)

    state = jax.tree.map(placed, shapes, where)
    return jax.jit(train.learn, donate_argnums=0).lower(state, batch(64), batch(16)).compile()


@pytest.mark.slow
def test_an_eighth_of_the_memory_and_of_the_operations() -> None:
    method, mesh = bilevel.soba(optax.adam(1e-3)), sharding.make_mesh()
    split, full = (language_model(method, mesh, s) for s in (True, False))
    alone = language_model(method, sharding.make_mesh(jax.devices()[:1]), False)
    memory, whole = split.memory_analysis(), full.memory_analysis()
    assert memory.argument_size_in_bytes < whole.argument_size_in_bytes / 7.5
    assert memory.output_size_in_bytes < whole.output_size_in_bytes / 7.5
    assert memory.alias_size_in_bytes == pytest.approx(memory.output_size_in_bytes, rel=0.01)  # donated
    assert memory.temp_size_in_bytes < whole.temp_size_in_bytes
    flops = [program.cost_analysis()["flops"] for program in (split, full, alone)]
    assert flops[0] < flops[2] / 7
    assert flops[1] < flops[2] / 7


SCANNED = TransformerConfig(layers=8, width=128, heads=4, feed_forward=512, remat=True, scan_layers=True)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_gathered_one_by_one_give_the_same_step(dropout: float) -> None:
    mesh, method = sharding.make_mesh(), bilevel.soba(optax.adam(1e-3))
    shape = dataclasses.replace(SCANNED, dropout=dropout)
    alone_step, init_alone = transformer_step(Transformer(shape), method, sharding.make_mesh(jax.devices()[:1]))
    train, init = transformer_step(Transformer(shape, mesh), method, mesh, gather=gathered_before)
    where = sharding.split_state(mesh, jax.eval_shape(init), min_size=16)
    assert not where.params["blocks"]["up"]["kernel"].is_fully_replicated
    step = jax.jit(train.map(sharding.keep_sharding(where)).learn)
    alone, spread = init_alone(), jax.jit(init, out_shardings=where)()
    rng = np.random.default_rng(0)
    for _ in range(3):
        batches = [
            {"tokens": rng.integers(0, 256, (n, 32), np.uint8), "length": np.full(n, 32, np.int32)} for n in (64, 16)
        ]
        alone, _ = jax.jit(alone_step.learn)(alone, *batches)
        spread, _ = step(spread, *(sharding.place_batch(mesh, batch) for batch in batches))
    assert toy.relative_error(sharding.whole(mesh, spread.params), alone.params) < 1e-4
    assert toy.relative_error(spread.weight_params, alone.weight_params) < 1e-3


@pytest.mark.parametrize(("method", "times"), [("dds", 2.5), ("soba", 4)])
def test_blocks_gathered_one_by_one_need_less_memory(method: str, times: float) -> None:
    mesh = sharding.make_mesh()
    by_block = language_model(METHODS[method](), mesh, True, Transformer(SCANNED, mesh), gather=gathered_before)
    at_once = language_model(METHODS[method](), mesh, True, Transformer(SCANNED))
    assert by_block.memory_analysis().temp_size_in_bytes < at_once.memory_analysis().temp_size_in_bytes / times


def test_bfloat16_tracker_is_half_as_large() -> None:
    def bytes_of(dtype: Any) -> int:
        state = jax.eval_shape(bilevel.soba(optax.sgd(0.1), dtype=dtype).init, toy.params(0))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.v))

    assert 2 * bytes_of(jnp.bfloat16) == bytes_of(None)
    wide, narrow = (bilevel.soba(optax.sgd(0.05), dtype=dtype) for dtype in (None, jnp.bfloat16))
    states = []
    for method in (wide, narrow):
        train = bilevel.make_step(
            toy.loss, toy.weighting, optax.sgd(0.01), optax.sgd(0.1), method, batch_size=run.SMALL, update_every=1
        )
        state, step = run.start(train), jax.jit(train.step)
        for i in range(run.STEPS):
            state, _ = step(state, *run.batches(i))
        states.append(state)
    assert toy.relative_error(states[1].method_state.v, states[0].method_state.v) < 0.02
    assert toy.relative_error(states[1].weight_params, states[0].weight_params) < 0.01
