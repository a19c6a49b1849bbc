"""Micro-batches: the same update to rounding, with less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.devices import sharding
from bilevel.types import UserError

METHODS = {
    "uniform": bilevel.uniform,
    "dds": bilevel.dds,
    "anograd": bilevel.anograd,
    "soba": lambda: bilevel.soba(optax.adam(1e-2)),
}
MODES = {"forward": bilevel.Forward(), "finite": bilevel.Finite()}


def build(method: Any, micro_batches: int, rows: int = 8, **options: Any) -> tuple[Any, Any, Any, Any]:
    train = bilevel.make_step(
        options.pop("loss", toy.loss),
        toy.weighting,
        optax.sgd(0.1),
        optax.sgd(1e-3),
        METHODS[method](),
        batch_size=rows,
        update_every=1,
        micro_batches=micro_batches,
        **options,
    )
    state = jax.jit(train.init)(jax.random.key(0), toy.params(0), toy.weight_params(1))
    return train, state, toy.arrays(2, 4 * rows), toy.arrays(3, rows)


@pytest.mark.parametrize(
    ("method", "mode"),
    [("uniform", "forward"), ("dds", "finite"), ("anograd", "forward"), ("soba", "forward"), ("soba", "finite")],
)
def test_same_update(method: str, mode: str) -> None:
    results = []
    for parts in (1, 4):
        train, state, batch, specific = build(method, parts, derivatives=MODES[mode])
        step = jax.jit(train.step)
        for _ in range(2):
            state, _ = step(state, batch, specific)
        results.append(step(state, batch, specific))
    (one, one_metrics), (four, four_metrics) = results
    # Differences of float32 losses over ε lose digits: what two ways of summing leave is 1e-7/1e-3 of them.
    tolerance = 1e-4 if mode == "forward" else 2e-2
    np.testing.assert_array_equal(one_metrics["selected"], four_metrics["selected"])
    assert toy.relative_error(four.params, one.params) < 1e-5
    start = toy.flat(toy.weight_params(1))
    change = np.linalg.norm(toy.flat(one.weight_params) - start)
    assert np.linalg.norm(toy.flat(four.weight_params) - toy.flat(one.weight_params)) <= tolerance * change
    assert method == "uniform" or change > 0


@pytest.mark.parametrize(("method", "mode"), [("dds", "finite"), ("soba", "forward")])
def test_less_memory(method: str, mode: str) -> None:
    def wide(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        inflated = jnp.tanh(batch["x"] @ p["first"]["kernel"])[:, :, None] * jnp.linspace(0, 1, 5000)
        hidden = jnp.tanh(inflated).mean(-1)
        return (hidden @ p["last"]["kernel"] - batch["y"]) ** 2, bilevel.LossAux(model_state, {})

    sizes = []
    for parts in (1, 8):
        train, state, batch, specific = build(method, parts, rows=64, loss=wide, derivatives=MODES[mode])
        memory = jax.jit(train.learn).lower(state, batch, specific).compile().memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 0.3 * sizes[0], sizes


def test_along_a_mapped_axis() -> None:
    train, state, batch, specific = build("soba", 2, derivatives=bilevel.Forward(), axis_name="data")
    alone, _, _, _ = build("soba", 1, derivatives=bilevel.Forward())
    mesh = sharding.make_mesh(jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        train.learn,
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=(spec(), spec()),
        check_vma=False,
    )
    expected, _ = jax.jit(alone.learn)(state, batch, specific)
    found, _ = jax.jit(mapped)(state, batch, specific)
    assert toy.relative_error(found.params, expected.params) < 1e-5
    assert toy.relative_error(found.weight_params, expected.weight_params) < 1e-5


def wide_loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return (jnp.tanh(hidden @ params["second"]).sum(1) - batch["y"]) ** 2, bilevel.LossAux(model_state, {})


@pytest.mark.parametrize("kind", ["plain", "learn"])
def test_each_device_computes_its_share_of_each_part(kind: str) -> None:
    """A part that lay on few of the devices would be computed by all of them."""
    mesh, rows, width = sharding.make_mesh(jax.devices()[:4]), 128, 64
    params = {"first": jnp.ones((8, width)), "second": jnp.ones((width, width))}
    batch = {"x": jnp.ones((2 * rows, 8)), "y": jnp.zeros(2 * rows)}
    flops, updated = [], []
    for parts in (1, 4):
        train = bilevel.make_step(
            wide_loss, lambda wp, x: x["x"] @ wp, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(),
            batch_size=rows, micro_batches=parts, mesh=mesh,
        )  # fmt: skip
        state = jax.device_put(train.init(jax.random.key(0), params, jnp.ones(8)), sharding.replicated(mesh))
        big, specific = (sharding.place_batch(mesh, x) for x in (batch, jax.tree.map(lambda x: x[:rows], batch)))
        step = jax.jit(getattr(train, kind)).lower(state, big, specific).compile()
        flops.append((step.cost_analysis() or {})["flops"])  # of one device; what is in a loop counts once
        updated.append(step(state, big, specific)[0])
    assert flops[1] < 0.4 * flops[0]
    assert toy.relative_error(updated[1].params, updated[0].params) < 1e-5


def test_losses_and_metrics_of_another_kind_are_refused() -> None:
    def coarse(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        losses, aux = toy.loss(params, model_state, batch, rng)
        return losses.astype(jnp.bfloat16), aux

    def scalar(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        losses, aux = toy.loss(params, model_state, batch, rng)
        return losses, aux._replace(metrics={"norm": jnp.mean(losses)})

    for parts in (1, 4):
        train, state, batch, specific = build("dds", parts, loss=coarse)
        with pytest.raises(UserError, match=r"The loss returned bfloat16, too coarse for Finite\(\)"):
            jax.eval_shape(train.step, state, batch, specific)
        train, state, batch, specific = build("dds", parts, loss=scalar)
        with pytest.raises(UserError, match=r"the metric 'norm' with shape \(\) for \d rows: give one value a row"):
            jax.eval_shape(train.step, state, batch, specific)


def test_batch_norm_state_is_the_mean_of_the_parts() -> None:
    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        mean = jnp.mean(batch)
        return (batch - params) ** 2, bilevel.LossAux({"mean": 0.9 * model_state["mean"] + 0.1 * mean}, {"x": batch})

    train = bilevel.make_step(
        loss, lambda wp, x: wp * x, optax.sgd(0.1), optax.sgd(0.1), bilevel.uniform(), batch_size=8, micro_batches=4
    )
    rows = jnp.arange(8.0)
    state = train.init(jax.random.key(0), jnp.zeros(()), jnp.zeros(()), {"mean": jnp.zeros(())})
    state, _ = jax.jit(train.step)(state, rows, rows)
    np.testing.assert_allclose(state.model_state["mean"], 0.1 * rows.mean(), rtol=1e-6)


def test_rows_must_divide() -> None:
    train, state, batch, specific = build("dds", 3)
    with pytest.raises(UserError, match=r"8 rows .* micro_batches=3"):
        train.step(state, batch, specific)
