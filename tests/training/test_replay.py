"""Weighting parameters that are given for each step, and the hook that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toy import toy_state, toy_train

import bilevel
from bilevel.data import ArrayDataset, Loader
from bilevel.training import Checkpoints, Data, LoopConfig, Replay, train
from bilevel.types import UserError

STEPS = 12


def weights(step: int) -> dict[str, jax.Array]:
    return {"a": jnp.full(3, step, jnp.float32)}


KEPT = [weights(0), weights(1)]  # given again and again, as by a cache


def toy_run(run_dir: Path | None, num_steps: int = STEPS, seen: dict[int, Any] | None = None, **config: Any) -> Any:
    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return (batch["x"] @ params["w"] - batch["y"]) ** 2, bilevel.LossAux(model_state, {})

    def loader(seed: int, size: int) -> Loader:
        x = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
        return Loader(ArrayDataset({"x": x, "y": x.sum(axis=1)}), size, seed=seed)

    step = bilevel.make_step(
        loss,
        lambda alpha, batch: batch["x"] @ alpha["a"],
        optax.sgd(0.05),
        optax.sgd(0.1),
        bilevel.frozen(),
        batch_size=4,
    )
    state = step.init(jax.random.key(0), {"w": jnp.zeros(3)}, {"a": jnp.full(3, -1.0)})

    def on_state(state: Any, step: int) -> None:
        if seen is not None:
            seen[step] = np.asarray(state.weight_params["a"]).copy()

    return train(
        step,
        state,
        data=Replay(Data(loader(0, 16), loader(1, 4)), lambda step: KEPT[step % 3 == 0]),
        config=LoopConfig(num_steps=num_steps, checkpoint_every=5, progress=False, state_every=1, **config),
        run_dir=run_dir,
        on_state=on_state,
    )


def test_each_step_uses_its_weights() -> None:
    seen: dict[int, Any] = {}
    toy_run(None, seen=seen)
    assert seen[0].tolist() == [-1] * 3
    for step in range(STEPS):
        np.testing.assert_array_equal(seen[step + 1], np.asarray(KEPT[step % 3 == 0]["a"]))
    assert not any(x.is_deleted() for x in jax.tree.leaves(KEPT))


def test_the_weights_decide_what_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy_run(None).state.params["w"]
    monkeypatch.setitem(KEPT[1], "a", jnp.asarray([5.0, -5.0, 0.0]))
    assert (toy_run(None).state.params["w"] != first).any()


def test_continuing_is_exact(tmp_path: Path) -> None:
    toy_run(tmp_path, num_steps=7)
    continued, straight = toy_run(tmp_path).state, toy_run(None).state
    np.testing.assert_array_equal(continued.params["w"], straight.params["w"])
    np.testing.assert_array_equal(continued.weight_params["a"], straight.weight_params["a"])


def test_one_step_a_call() -> None:
    with pytest.raises(UserError, match="steps_per_call=2 needs data that are on the device"):
        toy_run(None, steps_per_call=2)


def test_the_hook_sees_the_states_in_their_order(tmp_path: Path) -> None:
    def seen(num_steps: int, run_dir: Path | None = None, **config: Any) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}

        def on_state(state: Any, step: int) -> None:
            assert int(state.step) == step
            found[step] = np.asarray(state.params["w"]).copy()

        toy_train(run_dir, num_steps, on_state=on_state, **config)
        return found

    whole = seen(14, state_every=4)
    assert list(whole) == [0, 4, 8, 12, 14]
    assert list(seen(6)) == [0, 6]
    np.testing.assert_array_equal(whole[0], toy_state().params["w"])
    assert list(seen(10, tmp_path, state_every=4)) == [0, 4, 8, 10]
    continued = seen(14, tmp_path, state_every=4)  # from the checkpoint of step 10
    assert list(continued) == [12, 14]
    for step, value in continued.items():
        np.testing.assert_array_equal(value, whole[step])


def test_the_hook_comes_before_the_checkpoint(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def on_state(state: Any, step: int) -> None:
        if step == 10:
            raise Killed

    with pytest.raises(Killed):
        toy_train(tmp_path, 20, on_state=on_state, state_every=5, checkpoint_every=5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 5
