"""What the loop does besides stopping and continuing."""

from __future__ import annotations

import dataclasses
import math
import time
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toy import ROWS, SMALL, ToyLoader, toy_data, toy_evaluate, toy_state, toy_step, toy_train

import bilevel
from bilevel import data as library_data
from bilevel.data import ArrayDataset
from bilevel.training import Checkpoints, Data, LoopConfig, TrainingDiverged, train
from bilevel.training.loop import _Run
from bilevel.types import NOT_COMPUTED, UserError


def by_hand(num_steps: int) -> tuple[Any, list[dict[str, Any]]]:
    state, loaders, rows = toy_state(), (ToyLoader(1), ToyLoader(2)), []
    for step in range(num_steps):
        state, metrics = jax.jit(toy_step)(state, *(loader.batch(step) for loader in loaders))
        rows.append(metrics)
    return state, rows


def test_equals_a_plain_loop():
    result = toy_train(None, num_steps=12)
    state, metrics = by_hand(12)
    np.testing.assert_array_equal(result.state.params["w"], state.params["w"])
    assert [row["step"] for row in result.history] == [5, 10, 12]
    for row, steps in zip(result.history, [range(5), range(5, 10), range(10, 12)], strict=True):
        for name in ("generic_loss", "specific_loss"):  # the second is not computed at every other step
            found = [float(metrics[step][name]) for step in steps]
            assert row[name] == pytest.approx(np.mean([value for value in found if value != NOT_COMPUTED]))
    assert ["specific_valid_loss" in row for row in result.history] == [False, True, True]


def test_selected_ids_reach_the_callback():
    seen: dict[int, list[int]] = {}

    def on_selected(ids: np.ndarray, step: int) -> dict[str, float]:
        seen[step] = ids.tolist()
        return {"share/low": float(np.mean(ids < ROWS // 2))}

    result = toy_train(None, num_steps=7, on_selected=on_selected)
    _, metrics = by_hand(7)
    ids = [np.asarray(metrics[step]["ids"]).tolist() for step in range(7)]
    assert all(set(ids[step]) <= set(ToyLoader(1).batch(step)["id"]) for step in range(7))
    assert seen == {5: list(chain(*ids[:5])), 7: list(chain(*ids[5:]))}
    assert len(seen[5]) == 5 * SMALL
    assert result.history[-1]["share/low"] == np.mean(np.asarray(seen[7]) < ROWS // 2)


def test_nan_loss_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    with pytest.raises(TrainingDiverged, match=r"nan at step 18 .*checkpoint is that of step 10.*learning rate"):
        toy_train(tmp_path, data=toy_data(poison=17))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore_latest(toy_state())
    assert restored is not None
    assert restored[0] == 10
    assert np.isfinite(restored[1].params["w"]).all()
    healthy = toy_train(tmp_path)  # the same directory with good data goes on from there
    assert [row["step"] for row in healthy.history] == [5, 10, 15, 20, 25, 30]


def test_nan_parameters_are_not_saved(tmp_path: Path):
    def breaks(state: Any, big: Any, specific: Any) -> Any:
        new, metrics = toy_step(state, big, specific)
        params = jax.tree.map(lambda p: jnp.where(state.step == 19, jnp.nan, p), new.params)
        return new._replace(params=params), metrics

    with pytest.raises(TrainingDiverged, match="parameters are not finite after step 20"):
        toy_train(tmp_path, step=breaks)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 10


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_beside_the_parameters_is_not_saved(tmp_path: Path, value: float):
    """An infinity is: optimizers that look for a minimum begin with one."""

    def breaks(state: Any, big: Any, specific: Any) -> Any:
        new, metrics = toy_step(state._replace(ema=None), big, specific)
        return new._replace(ema=jnp.where(state.step == 14, value, state.ema)), metrics

    start, config = toy_state()._replace(ema=jnp.zeros(2)), LoopConfig(20, checkpoint_every=10, progress=False)
    if np.isinf(value):
        assert int(train(breaks, start, data=toy_data(), config=config, run_dir=tmp_path).state.step) == 20
        return
    with pytest.raises(TrainingDiverged, match=r"NaN in state.ema after step 20, .*checkpoint is that of step 10"):
        train(breaks, start, data=toy_data(), config=config, run_dir=tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 10


def test_state_without_a_step():
    with pytest.raises(UserError, match="The state, a dict, has no field `step`: give it one"):
        train(toy_step, {"params": jnp.zeros(3)}, data=toy_data(), config=LoopConfig(1, progress=False))


def test_diverged_without_run_dir():
    with pytest.raises(TrainingDiverged, match=r"nan at step 1: lower the learning rate"):
        toy_train(None, data=toy_data(poison=0))


def test_continues_and_adds_up_seconds(tmp_path: Path):
    first = toy_train(tmp_path, num_steps=20)
    assert first.compile_seconds > 0
    more = toy_train(tmp_path, num_steps=40)
    assert [row["step"] for row in more.history] == list(range(5, 41, 5))
    assert more.seconds > first.history[-1]["seconds"] > 0
    again = toy_train(tmp_path, num_steps=40)  # nothing left to do
    assert again.history == more.history
    assert again.seconds == pytest.approx(more.seconds, abs=0.01)
    assert again.compile_seconds == 0
    with pytest.raises(UserError, match="trained for 40 steps already, and 30 are asked for"):
        toy_train(tmp_path, num_steps=30)


def test_seconds_leave_out_evaluation():
    def slow_evaluation(state: Any) -> dict[str, float]:
        time.sleep(0.3)
        return toy_evaluate(state)

    config = LoopConfig(num_steps=8, log_every=4, evaluate_every=4, progress=False)
    result = train(toy_step, toy_state(), data=toy_data(), config=config, evaluate=slow_evaluation)
    assert result.seconds < 0.3
    slow = toy_train(None, num_steps=8, data=toy_data(delay=0.05))  # waiting for data does count
    assert slow.seconds > 0.15


def test_one_compilation(tmp_path: Path):
    traces = []

    def counted(state: Any, big: Any, specific: Any) -> Any:
        traces.append(1)
        return toy_step(state, big, specific)

    toy_train(tmp_path, num_steps=20, step=counted)
    assert len(traces) == 1
    toy_train(tmp_path, num_steps=40, step=counted)  # the restored state is of the same types
    assert len(traces) == 1


def test_one_compilation_when_parts_of_the_state_were_placed_by_hand(caplog: pytest.LogCaptureFixture):
    state = toy_state()
    placed = jax.device_put(state.params, state.params["w"].sharding)  # committed to their device, unlike the rest

    def fresh(state: Any, big: Any, specific: Any) -> Any:
        return toy_step(state, big, specific)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        toy_train(None, num_steps=5, state=state._replace(params=placed), step=fresh)
    assert sum("Compiling jit(fresh)" in record.message for record in caplog.records) == 1


def test_weak_types_survive_continuing(tmp_path: Path):
    def weak() -> Any:
        return toy_state()._replace(step=0, ema=jnp.asarray(1.0))  # a Python number and a weak type

    def step(state: Any, big: Any, specific: Any) -> Any:
        new, metrics = toy_step(state, big, specific)
        return new._replace(ema=state.ema * 0.5), metrics

    toy_train(tmp_path, num_steps=10, state=weak(), step=step)
    assert float(toy_train(tmp_path, num_steps=12, state=weak(), step=step).state.ema) == 0.5**12


def test_shardings_survive_continuing(tmp_path: Path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(batch: Any) -> Any:
        return jax.device_put(batch, replicated)

    data = Data(ToyLoader(1), ToyLoader(2), place, place)
    for num_steps in (10, 20):
        result = toy_train(tmp_path, num_steps=num_steps, data=data, state=place(toy_state()))
    assert result.state.params["w"].sharding.is_equivalent_to(replicated, 1)


def test_error_of_a_loader_reaches_the_caller(tmp_path: Path):
    class Broken(ToyLoader):
        def batch(self, step: int, /) -> dict[str, np.ndarray]:
            if step == 13:
                raise UserError("row 7 of some.txt is not UTF-8: save the file as UTF-8.")
            return super().batch(step)

    with pytest.raises(UserError, match=r"row 7 of some\.txt"):
        toy_train(tmp_path, data=Data(Broken(1), ToyLoader(2)))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 10


@pytest.mark.parametrize(
    "name", ["num_steps", "log_every", "evaluate_every", "checkpoint_every", "state_every", "keep"]
)
def test_bad_numbers(name: str):
    with pytest.raises(UserError, match=f"{name} is -1"):
        dataclasses.replace(LoopConfig(num_steps=5), **{name: -1})


def test_plain_progress_lines(capsys: pytest.CaptureFixture[str]):
    toy_train(None, num_steps=10, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 5/10  generic_loss ")
    assert lines[-1].startswith("step 10/10  generic_loss ")


def test_tensorboard_mirror(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    toy_train(tmp_path, num_steps=10, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_rows_are_finite_or_nan_only_where_nothing_was_computed():
    result = toy_train(None, num_steps=2, log_every=1, evaluate_every=0)
    assert [math.isnan(row["specific_loss"]) for row in result.history] == [False, True]


def test_a_step_choice_gives_the_function_of_each_step():
    class Choice(NamedTuple):
        even: Any
        odd: Any

        def at(self, step: int, /) -> Any:
            return self.odd if step % 2 else self.even

    traces = []

    def program(name: str) -> Any:
        def step(state: Any, big: Any, specific: Any) -> Any:
            traces.append(name)
            new, metrics = toy_step(state, big, specific)
            return new, {**metrics, "odd": jnp.float32(name == "odd")}

        return step

    result = toy_train(None, num_steps=7, step=Choice(program("even"), program("odd")), log_every=1)
    assert [row["odd"] for row in result.history] == [0, 1, 0, 1, 0, 1, 0]
    assert traces == ["even", "odd"]
    assert_same_params(result.state, by_hand(7)[0])


def assert_same_params(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_with_the_step_and_loaders_of_the_library(tmp_path: Path):
    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return (batch["x"] @ params["w"] - batch["y"]) ** 2, bilevel.LossAux(model_state, {})

    def rows(seed: int) -> Any:
        x = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
        return ArrayDataset({"x": x, "y": x.sum(axis=1)}, name="toy")

    parts = bilevel.make_step(
        loss,
        lambda alpha, batch: batch["x"] @ alpha["a"],
        optax.adam(0.1),
        optax.sgd(0.1),
        bilevel.soba(optax.sgd(0.01)),
        batch_size=4,
        update_every=2,
    )

    def start(num_steps: int, run_dir: Path | None) -> Any:
        state = parts.init(jax.random.key(0), {"w": jnp.zeros(3)}, {"a": jnp.zeros(3)})
        data = Data(library_data.Loader(rows(0), 16, seed=0), library_data.Loader(rows(1), 4, seed=1))
        config = LoopConfig(num_steps=num_steps, log_every=4, checkpoint_every=6, progress=False)
        return train(
            parts, state, data=data, config=config, run_dir=run_dir, on_selected=lambda ids, step: {"n": len(ids)}
        )

    straight = start(16, None)
    start(10, tmp_path)
    continued = start(16, tmp_path)
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(continued.state), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    assert [row["step"] for row in straight.history] == [4, 6, 8, 12, 16]
    assert straight.history[0]["n"] == 16
    assert straight.history[-1]["effective_sample_size"] > 1


def test_until_ends_a_run_for_good(tmp_path: Path) -> None:
    asked: list[int] = []

    def until(done: int) -> bool:
        asked.append(done)
        return done >= 20

    given: dict[str, Any] = {"num_steps": 100, "evaluate_every": 10, "checkpoint_every": 0, "until": until}
    first = toy_train(tmp_path, **given)
    assert (int(first.state.step), first.stopped_early, asked) == (20, False, [10, 20])
    again = toy_train(tmp_path, **given)
    assert (int(again.state.step), again.stopped_early, asked) == (20, False, [10, 20, 20])
    np.testing.assert_array_equal(again.state.params["w"], first.state.params["w"])
    assert again.history == first.history


def test_one_loader_for_both_kinds_loads_a_batch_once() -> None:
    class Counted(ToyLoader):
        loaded = 0

        def batch(self, step: int, /) -> dict[str, np.ndarray]:
            self.loaded += 1
            return super().batch(step)

    loader = Counted(1)
    once = toy_train(None, num_steps=6, data=Data(loader, loader))
    assert loader.loaded == 6
    twice = toy_train(None, num_steps=6, data=Data(ToyLoader(1), ToyLoader(1)))
    np.testing.assert_array_equal(once.state.params["w"], twice.state.params["w"])


@pytest.mark.parametrize("name", ["step", "seconds"])
def test_names_that_each_row_has_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"gave a value called '{name}', which each row has already"):
        train(
            toy_step, toy_state(), data=toy_data(), config=LoopConfig(num_steps=4, progress=False), run_dir=tmp_path,
            evaluate=lambda state: {name: 1e6},
        )  # fmt: skip


def test_a_step_that_moves_the_state_compiles_twice_but_not_on_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are committed to a device commit the state: its second call is a compilation too."""
    device = jax.devices()[0]
    calls: list[int] = []
    original = _Run._first_call

    def first_call(self: Any, *given: Any) -> Any:
        calls.append(1)
        return original(self, *given)

    monkeypatch.setattr(_Run, "_first_call", first_call)
    for place, count in ((None, 1), (lambda batch: jax.device_put(batch, device), 2)):
        calls.clear()
        given = {} if place is None else {"place_generic": place}
        data = Data(ToyLoader(1), ToyLoader(2), **given)
        train(toy_step, toy_state(), data=data, config=LoopConfig(num_steps=12, log_every=4, progress=False))
        assert len(calls) == count


def test_a_path_may_be_text(tmp_path: Path) -> None:
    config = LoopConfig(num_steps=2, progress=False)
    train(toy_step, toy_state(), data=toy_data(), config=config, run_dir=str(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def with_metrics(**given: Any) -> Any:
    """The toy's step with other metrics: a function of the number of the step, from 1, for each."""

    def step(state: Any, big: Any, specific: Any) -> Any:
        new, metrics = toy_step(state, big, specific)
        return new, {**metrics, **{name: jnp.asarray(value(state.step + 1)) for name, value in given.items()}}

    return step


def at(number: int, value: float, other: float = 0.0) -> Any:
    return lambda step: jnp.where(step == number, value, other)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"specific_loss": at(7, np.nan)}, "The specific loss, or its gradient, is not finite at step 7"),
        ({"specific_loss": at(7, np.inf)}, "The specific loss, or its gradient, is not finite at step 7"),
        ({"alignment_rms": at(7, np.nan)}, "The probe, or the alignment of a row with it, is not finite at step 7"),
        ({"weight_gradient_norm": at(7, np.nan)}, "The gradient of α is not finite at step 7"),
        (
            {"specific_loss": at(7, 1.0)},
            "What an α-step would make of α or of the method's state is not finite at step 7",
        ),
        (
            {"bad_logits": at(3, 2.0), "bad_logit_row": at(3, 41.0, -1.0)},
            r"The logit of row 41 of the big batch \(and 1 more\) is not finite at step 3",
        ),
    ],
)
def test_what_a_step_goes_on_without_is_named_once(metrics: dict[str, Any], message: str) -> None:
    step = with_metrics(**metrics, alpha_skipped=lambda step: (step % 4 == 3) & (step >= 7))
    with pytest.warns(UserWarning, match=f"{message}, and training goes on without it: ") as caught:
        rows = toy_train(None, num_steps=20, step=step).history
    assert len(caught) == 1
    assert rows[-1]["alpha_skipped"] == pytest.approx(1 / 5)
    assert "bad_logit_row" not in rows[-1]


def test_the_first_that_was_not_finite_is_named_when_the_loss_is_not() -> None:
    """Of the same step, all follow from θ."""
    step = with_metrics(specific_loss=at(4, np.nan), alpha_skipped=at(4, 1.0))
    message = (
        r"^The specific loss, or its gradient, is not finite at step 4; the generic loss is nan at step 18: look at the "
        r"specific rows .*, then lower the learning rate"
    )
    with (
        pytest.warns(UserWarning, match="at step 4, and training goes on"),
        pytest.raises(TrainingDiverged, match=message),
    ):
        toy_train(None, step=step, data=toy_data(poison=17))
    step = with_metrics(specific_loss=at(18, np.nan), alpha_skipped=at(18, 1.0))
    with pytest.raises(TrainingDiverged, match=r"^The generic loss is nan at step 18: lower the learning rate"):
        toy_train(None, step=step, data=toy_data(poison=17))


def test_a_loss_of_minus_infinity_diverges_but_where_no_row_was_left() -> None:
    step = with_metrics(generic_loss=at(4, -np.inf, 1.0))
    with pytest.raises(TrainingDiverged, match=r"^The generic loss is -inf at step 4"):
        toy_train(None, num_steps=20, step=step)
    step = with_metrics(generic_loss=at(4, -np.inf, 1.0), rows_left_out=at(4, 8.0))
    with pytest.warns(UserWarning, match="At step 4 the big batch had fewer rows left than a batch"):
        rows = toy_train(None, num_steps=20, step=step).history
    assert rows[-1]["generic_loss"] == 1.0


def test_alignments_of_zero_on_all_alpha_steps_are_warned_of() -> None:
    def silent_but(moving: int) -> Any:
        return with_metrics(
            alignment_rms=lambda step: jnp.where(step % 2, NOT_COMPUTED, jnp.where(step == moving, 1.0, 0.0))
        )

    with pytest.warns(UserWarning, match="All alignments were 0 on each of the first 20 α-steps") as caught:
        toy_train(None, num_steps=100, step=silent_but(0), log_every=10)
    assert len(caught) == 1
    toy_train(None, num_steps=100, step=silent_but(8), log_every=10)
    toy_train(None, num_steps=36, step=silent_but(0), log_every=10)
    toy_train(None, num_steps=100, step=with_metrics(alignment_rms=lambda step: NOT_COMPUTED), log_every=10)


def test_means_leave_out_what_was_not_computed() -> None:
    step = with_metrics(
        probed=lambda step: jnp.where(step % 2, NOT_COMPUTED, step * 1.0), never=lambda step: NOT_COMPUTED
    )
    row = toy_train(None, num_steps=4, step=step, log_every=4, evaluate_every=0).history[0]
    assert row["probed"] == 3
    assert math.isnan(row["never"])


def test_parameters_of_the_weighting_network_are_told_from_those_of_the_model() -> None:
    class Both(NamedTuple):
        step: Any
        params: Any
        weight_params: Any

    def step(state: Both, big: Any, specific: Any) -> Any:
        bad = jnp.where(state.step == 2, jnp.inf, state.weight_params)
        return Both(state.step + 1, state.params, bad), {"generic_loss": jnp.zeros(())}

    start = Both(jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(TrainingDiverged, match="The parameters of the weighting network are not finite after step 5"):
        train(step, start, data=toy_data(), config=LoopConfig(5, evaluate_every=5, progress=False))
