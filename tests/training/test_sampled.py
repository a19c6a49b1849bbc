"""The loop trains with a sampler, and a run that was stopped goes on bit for bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import samplers
from bilevel.data import ArrayDataset, RowView
from bilevel.training import Checkpoints, LoopConfig, Sampled, SequenceRecorder, TrainingDiverged, train
from bilevel.types import LossAux

ROWS, BATCH = 9, 2
X = np.random.default_rng(0).normal(size=(ROWS + 4, 3)).astype(np.float32)
DATA, VALIDATION = ({"x": x, "y": x.sum(1)} for x in (X[:ROWS], X[ROWS:]))


def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[jax.Array, LossAux]:
    found = batch["x"] @ params
    return (found - batch["y"]) ** 2, LossAux(model_state, {"logits": found})


@pytest.mark.slow
def test_the_loop_with_a_sampler(tmp_path: Path) -> None:
    chosen = samplers.rl_sampler(
        ROWS, BATCH, 1, update_every=4, reward_every=2, summary_size=2, logger_size=3, policy_size=2
    )
    run = bilevel.make_sampled_step(chosen, loss, optax.adam(0.1))
    init = jax.jit(run.init)
    source, drawn = Sampled(ArrayDataset(DATA), ArrayDataset(VALIDATION)), []

    def go(steps: int, directory: Path, steps_per_call: int) -> Any:
        config = LoopConfig(steps, 2, checkpoint_every=5, progress=False, steps_per_call=steps_per_call)
        state = init(jax.random.key(0), jnp.zeros(3))
        return train(
            run.step, state, data=source, config=config, run_dir=directory,
            on_selected=lambda ids, step: drawn.append((step, ids)) or {},
        )  # fmt: skip

    whole = go(10, tmp_path / "whole", 3)
    assert [step for step, _ in drawn] == [2, 4, 5, 6, 8, 10]
    np.testing.assert_array_equal(np.concatenate([ids for _, ids in drawn][-2:]).reshape(-1, BATCH)[-2:],
                                  whole.state.sampler.window.draws[:2])  # fmt: skip
    assert [np.isfinite(row["reward"]) for row in whole.history] == [True, True, False, True, True, True]
    go(5, tmp_path / "parts", 3)
    parts = go(10, tmp_path / "parts", 3)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_the_call_that_compiles_makes_no_step() -> None:
    run = bilevel.make_sampled_step(samplers.uniform(ROWS, BATCH), loss, optax.sgd(0.1))
    source = Sampled(ArrayDataset(DATA), ArrayDataset(VALIDATION))
    (program, _), item = source.programs(run.step, 3).at(0), source.item(0, 2, 3)
    assert item.idle is not None
    state, _ = program(run.init(jax.random.key(0), jnp.zeros(3)), *item.idle)
    np.testing.assert_array_equal(state.train.params, np.zeros(3))
    assert int(state.step) == 0
    state, metrics = program(state, *item.arguments)
    assert int(state.step) == 2
    assert metrics["generic_loss"].shape == (3,)


def test_each_kind_of_step_in_a_loop_of_its_own(tmp_path: Path) -> None:
    """The rows are those of a view, whose ids are their numbers in the whole; the recorder keeps those in the view."""
    chosen = samplers.replayed(np.arange(10).reshape(5, 2) % ROWS, ROWS)
    run = bilevel.make_sampled_step(chosen, loss, optax.sgd(0.1))
    places = np.arange(ROWS)[::-1] + 2
    view = RowView(ArrayDataset({"x": X, "y": X.sum(1)}), places)
    recorder, seen, calls = SequenceRecorder(tmp_path / "rows", BATCH, places), [], []

    def observer(function: Any) -> Any:
        def observed(*arguments: Any) -> Any:
            calls.append(function)
            state, metrics = function(*arguments)
            return state, {**metrics, "largest": jnp.max(metrics["ids"]).astype(jnp.float32)}

        return observed

    def on_selected(ids: np.ndarray, step: int) -> Any:
        seen.extend(ids.tolist())
        return recorder(ids, step)

    watched = run.map(observer)
    ends = []
    for step, keep in ((watched, on_selected), (run.step, None)):
        state, config = run.init(jax.random.key(0), jnp.zeros(3)), LoopConfig(5, 5, progress=False, steps_per_call=2)
        source = Sampled(view, ArrayDataset(VALIDATION))
        ends.append(train(step, state, data=source, config=config, on_selected=keep))
    assert set(calls) <= set(run.kinds)
    rows = np.arange(10) % ROWS
    assert seen == places[rows].tolist()
    np.testing.assert_array_equal(recorder.sequence(), rows.reshape(5, 2))
    assert ends[0].history[-1]["largest"] == places[rows].reshape(5, 2).max(1).mean()
    np.testing.assert_allclose(ends[0].state.params, ends[1].state.params, rtol=1e-5)


def test_a_policy_of_nan_is_divergence(tmp_path: Path) -> None:
    """It would draw row 0 for ever, with finite losses."""
    chosen = samplers.rl_sampler(
        ROWS, BATCH, 1, update_every=4, reward_every=2, summary_size=2, logger_size=3, policy_size=2
    )
    run = bilevel.make_sampled_step(chosen, loss, optax.sgd(0.01))
    broken = {"x": np.full_like(VALIDATION["x"], np.nan), "y": VALIDATION["y"]}
    source = Sampled(ArrayDataset(DATA), ArrayDataset(broken))
    config = LoopConfig(20, 2, checkpoint_every=10, progress=False)
    with pytest.raises(TrainingDiverged, match=r"NaN in state.sampler after step 10"):
        train(run.step, run.init(jax.random.key(0), jnp.zeros(3)), data=source, config=config, run_dir=tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
