"""Data on the device, and many steps in one call: the same training as with batches that travel."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toy import BIG, SMALL, WIDTH, ToyState, toy_evaluate, toy_state, toy_step

import bilevel
from bilevel.data import ArrayDataset, Loader, MixedLoader, RowView
from bilevel.devices import sharding
from bilevel.training import Data, LoopConfig, Resident, TrainingDiverged, TrainResult, train
from bilevel.training.many_steps import many_steps
from bilevel.types import UserError

ROWS = 40


def rows(seed: int, poison: int | None = None) -> ArrayDataset:
    x = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)
    y = (x @ np.arange(WIDTH) + 1).astype(np.float32)
    y[[] if poison is None else [poison]] = np.nan
    return ArrayDataset({"x": x, "y": y}, name="toy")


def loaders(poison: int | None = None) -> tuple[Loader, Loader]:
    return Loader(rows(1, poison), BIG, seed=5), Loader(rows(2), 6, seed=6)


@functools.cache
def resident() -> Resident:
    return Resident(*loaders())


def run(
    run_dir: Path | None, data: Any, step: Any = toy_step, state: Any = None, terminate_at: int = 0, **config: Any
) -> TrainResult:
    chosen: dict[str, int] = {"num_steps": 23, "log_every": 6, "evaluate_every": 9, "checkpoint_every": 10}
    settings = LoopConfig(**chosen | {"progress": False} | config)  # pyright: ignore[reportArgumentType]
    state = toy_state() if state is None else state

    def on_selected(ids: np.ndarray, at: int) -> dict[str, float]:
        if at == terminate_at:
            signal.raise_signal(signal.SIGTERM)
        return {"ids": float(ids @ np.arange(1, len(ids) + 1)), "count": len(ids)}

    return train(
        step, state, data=data, config=settings, run_dir=run_dir, evaluate=toy_evaluate, on_selected=on_selected
    )


class Choice(NamedTuple):
    """`learn` moves the moving average too."""

    period: int = 4

    def at(self, step: int, /) -> Any:
        return learn if step % self.period == 0 else plain


def plain(state: ToyState, big: Any, specific: Any) -> Any:
    new, metrics = toy_step(state, big, specific)
    return new._replace(ema=state.ema), {**metrics, "learned": jnp.float32(0)}


def learn(state: ToyState, big: Any, specific: Any) -> Any:
    new, metrics = toy_step(state, big, specific)
    return new._replace(ema=0.5 * state.ema + jnp.mean(specific["y"])), {**metrics, "learned": jnp.float32(1)}


def with_average() -> ToyState:
    return toy_state()._replace(ema=jnp.zeros(()))


def assert_close(one: TrainResult, other: TrainResult) -> None:
    for a, b in zip(leaves(one.state), leaves(other.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [row["step"] for row in one.history] == [row["step"] for row in other.history]
    for a, b in zip(one.history, other.history, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, nan_ok=True), (a["step"], name)
        assert a["ids"] == b["ids"]  # the same rows in the same order


def leaves(state: Any) -> list[np.ndarray]:
    keys = (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)
    )
    return [np.asarray(x) for x in keys]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def test_a_data_set_that_both_loaders_share_lies_there_once():
    one, _ = loaders()
    generic, specific = Resident(one, Loader(one.dataset, 6, seed=6)).item(0, 1, 1).arguments[0][0]
    assert generic is specific
    generic, specific = resident().item(0, 1, 1).arguments[0][0]
    assert generic["x"] is not specific["x"]


@pytest.mark.parametrize("steps_per_call", [1, 4, 7])
def test_equals_batches_that_travel(steps_per_call: int):
    streamed = run(None, Data(*loaders()))
    assert [row["step"] for row in streamed.history] == [6, 9, 10, 12, 18, 20, 23]
    assert_close(run(None, resident(), steps_per_call=steps_per_call), streamed)


@pytest.mark.parametrize("spread", [False, True])
def test_mixed_batches(spread: bool):
    """The generic rows are some of a whole, whose numbers are their ids."""
    some = RowView(rows(1), np.arange(ROWS)[::-3])
    mixed = MixedLoader(Loader(some, BIG - 2, seed=5), Loader(rows(3), 2, seed=7))
    mesh = sharding.make_mesh(jax.devices()[:2]) if spread else None
    held = Resident(mixed, loaders()[1], mesh)
    state = toy_state() if mesh is None else jax.device_put(toy_state(), sharding.replicated(mesh))
    streamed = run(None, Data(mixed, loaders()[1]))
    assert_close(run(None, held, state=state, steps_per_call=4), streamed)


def test_a_mesh_that_does_not_divide_the_rows_is_refused():
    mesh = sharding.make_mesh(jax.devices()[:4])
    with pytest.raises(UserError, match="specific_rows=6 cannot be divided among 4 devices"):
        Resident(*loaders(), mesh)


@pytest.mark.parametrize("steps_per_call", [1, 3, 8])
def test_each_step_gets_its_function(steps_per_call: int):
    config: dict[str, int] = {"log_every": 1, "steps_per_call": steps_per_call}
    every = run(None, resident(), Choice(), with_average(), **config)
    assert [row["learned"] for row in every.history] == [float(step % 4 == 0) for step in range(23)]
    streamed = run(None, Data(*loaders()), Choice(), with_average())
    together = run(None, resident(), Choice(), with_average(), steps_per_call=steps_per_call)
    assert_close(together, streamed)
    assert together.history[0]["learned"] == pytest.approx(2 / 6)
    assert_same(together.state, every.state)  # how steps are put together is of no consequence


def test_calls_end_where_something_is_due():
    config = LoopConfig(50, log_every=12, evaluate_every=0, checkpoint_every=20, steps_per_call=8)
    calls = list(config.calls(3))
    assert calls == [(3, 8), (11, 1), (12, 8), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 2)]
    assert list(config.calls(50)) == []


@pytest.mark.parametrize("first_part", [1, 9, 13])
def test_stopped_anywhere_and_continued_is_bit_identical(tmp_path: Path, first_part: int):
    run(tmp_path, resident(), Choice(), with_average(), num_steps=first_part, steps_per_call=4)
    continued = run(tmp_path, resident(), Choice(), with_average(), steps_per_call=4)
    straight = run(None, resident(), Choice(), with_average(), steps_per_call=4)
    assert_same(continued.state, straight.state)
    assert continued.history[-1]["ids"] == straight.history[-1]["ids"]


def test_a_signal_ends_the_call_and_saves(tmp_path: Path):
    config: dict[str, int] = {"log_every": 6, "evaluate_every": 0, "checkpoint_every": 0, "steps_per_call": 4}
    stopped = run(tmp_path, resident(), Choice(), with_average(), terminate_at=6, **config)
    assert stopped.stopped_early
    assert [row["step"] for row in stopped.history] == [6, 10]
    assert int(stopped.state.step) == 10
    continued = run(tmp_path, resident(), Choice(), with_average(), **config)
    assert not continued.stopped_early
    assert_same(continued.state, run(None, resident(), Choice(), with_average(), **config).state)


def test_one_compilation():
    traces: list[int] = []

    def counted(state: Any, big: Any, specific: Any) -> Any:
        traces.append(1)
        return toy_step(state, big, specific)

    first = run(None, resident(), counted, steps_per_call=4)
    assert first.compile_seconds > 0
    once = len(traces)  # traced for the shapes of the metrics, and for the loop
    run(None, resident(), counted, steps_per_call=4, log_every=5)
    assert len(traces) == once
    _, new = resident().programs(counted, 4).at(0)
    assert new


def test_the_call_that_compiles_makes_no_step():
    traces: list[int] = []

    def counted(state: Any, big: Any, specific: Any) -> Any:
        traces.append(1)
        return toy_step(state, big, specific)

    item, state = resident().item(3, 4, 4), toy_state()
    program, _ = resident().programs(counted, 4).at(0)
    assert item.idle is not None
    same, metrics = program(jax.tree.map(jnp.copy, state), *item.idle)
    assert_same(same, state)
    assert not metrics["generic_loss"].any()
    once = len(traces)
    after, _ = program(same, *item.arguments)
    assert int(after.step) == 4
    assert len(traces) == once


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_nan_names_the_step(steps_per_call: int):
    poison = int(loaders()[0].indices(4)[0])
    with pytest.raises(TrainingDiverged) as streamed:
        run(None, Data(*loaders(poison)), log_every=23)
    with pytest.raises(TrainingDiverged) as held:
        run(None, Resident(*loaders(poison)), log_every=23, evaluate_every=0, steps_per_call=steps_per_call)
    assert "nan at step" in str(held.value)
    assert str(held.value).split(":")[0] == str(streamed.value).split(":")[0]


def test_rows_spread_over_devices():
    mesh = sharding.make_mesh()
    state = jax.device_put(with_average(), sharding.replicated(mesh))
    several = Resident(Loader(rows(1), 8, seed=5), Loader(rows(2), 8, seed=6), mesh)
    _, numbers = several.item(0, 2, 4).arguments[0]
    assert len(numbers[0].rows.addressable_shards) == mesh.size
    spread = run(None, several, Choice(), state, steps_per_call=4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.state))
    one = Resident(Loader(rows(1), 8, seed=5), Loader(rows(2), 8, seed=6))
    assert_close(spread, run(None, one, Choice(), with_average(), steps_per_call=4))


def test_with_the_step_of_the_library():
    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return (batch["x"] @ params["w"] - batch["y"]) ** 2, bilevel.LossAux(model_state, {})

    parts = bilevel.make_step(
        loss,
        lambda alpha, batch: batch["x"] @ alpha["a"],
        optax.adam(0.1),
        optax.sgd(0.1),
        bilevel.soba(optax.sgd(0.01)),
        batch_size=SMALL,
        update_every=4,
    )
    start = functools.partial(parts.init, jax.random.key(0), {"w": jnp.zeros(WIDTH)}, {"a": jnp.zeros(WIDTH)})

    def evaluated(data: Any, **config: Any) -> Any:
        settings = LoopConfig(num_steps=14, log_every=6, progress=False, **config)
        return train(parts, start(), data=data, config=settings, on_selected=lambda ids, at: {"ids": float(ids.sum())})

    held, streamed = evaluated(resident(), steps_per_call=5), evaluated(Data(*loaders()))
    for a, b in zip(leaves(held.state), leaves(streamed.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [row["ids"] for row in held.history] == [row["ids"] for row in streamed.history]


def test_what_does_not_go_together(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="steps_per_call=4 needs data that are on the device"):
        run(None, Data(*loaders()), steps_per_call=4)
    with pytest.raises(UserError, match="steps_per_call is 0"):
        LoopConfig(5, steps_per_call=0)

    class Unknown:
        def at(self, step: int, /) -> Any:
            return toy_step

    with pytest.raises(UserError, match="Unknown chooses a function for each step, but has no `period`"):
        many_steps(Unknown(), 4, lambda given, made: given)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="Resident data are for one process, and this run has 2"):
        Resident(*loaders())
