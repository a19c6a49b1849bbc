"""A linear model with noise, small enough to train in milliseconds: state, step and loaders."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.training import Data, LoopConfig, TrainResult, train
from bilevel.types import NOT_COMPUTED

ROWS, WIDTH, BIG, SMALL = 64, 3, 8, 4


class ToyState(NamedTuple):
    step: Any
    params: Any
    momentum: Any
    ema: Any
    rng: Any


def toy_state(seed: int = 0) -> ToyState:
    params = {"w": jnp.zeros(WIDTH), "b": jnp.zeros(())}
    rng = jax.random.key(seed)
    return ToyState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.zeros_like, params), None, rng)


def toy_step(state: ToyState, big: dict[str, Any], specific: dict[str, Any]) -> tuple[ToyState, dict[str, Any]]:
    key = jax.random.fold_in(state.rng, state.step)
    selected = jax.random.permutation(key, BIG)[:SMALL].astype(jnp.int32)
    rows = {name: value[selected] for name, value in big.items()}

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params, rows)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
    params = jax.tree.map(lambda p, m: p - 0.01 * m, state.params, momentum)
    metrics = {
        "generic_loss": value,
        "specific_loss": jnp.where(state.step % 2 == 0, loss(state.params, specific), NOT_COMPUTED),
        "ids": rows["id"],
    }
    return ToyState(state.step + 1, params, momentum, None, state.rng), metrics


class ToyLoader:
    """`poison` puts a NaN into the batch of that step; `delay` slows each batch down (seconds)."""

    def __init__(self, seed: int, poison: int | None = None, delay: float = 0.0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        self.y = (self.x @ np.arange(WIDTH) + 1).astype(np.float32)
        self._seed, self._poison, self._delay = seed, poison, delay

    def batch(self, step: int, /) -> dict[str, np.ndarray]:
        time.sleep(self._delay)
        ids = np.random.default_rng((self._seed, step)).integers(0, ROWS, BIG).astype(np.int32)
        y = self.y[ids] * (np.nan if step == self._poison else 1.0)
        return {"x": self.x[ids], "y": y.astype(np.float32), "id": ids}


def toy_data(poison: int | None = None, delay: float = 0.0) -> Data:
    return Data(ToyLoader(1, poison, delay), ToyLoader(2))


def toy_evaluate(state: ToyState) -> dict[str, float]:
    return {"specific_valid_loss": float(state.params["b"])}


def toy_train(
    run_dir: Path | None,
    num_steps: int = 30,
    data: Data | None = None,
    state: ToyState | None = None,
    step: Any = toy_step,
    on_selected: Any = None,
    on_state: Any = None,
    until: Any = None,
    **config: Any,
) -> TrainResult:
    settings = {"log_every": 5, "evaluate_every": 10, "checkpoint_every": 10, "progress": False} | config
    return train(
        step,
        toy_state() if state is None else state,
        data=toy_data() if data is None else data,
        config=LoopConfig(num_steps=num_steps, **settings),
        run_dir=run_dir,
        evaluate=toy_evaluate,
        on_selected=on_selected,
        on_state=on_state,
        until=until,
    )


def _interrupted(run_dir: Path, num_steps: int, interruptions: list[str]) -> None:
    """Start the run once for each `SIGNAL:rows:seconds`; at last let it end.

    The signal comes `seconds` after the file of metrics has `rows` rows. Forking a process that has imported
    everything, but has not used jax yet, saves the imports.
    """
    for interruption in [*interruptions, ""]:
        child = os.fork()
        if child == 0:
            data = toy_data(delay=0.02)
            result = toy_train(run_dir, num_steps, data, log_every=2, checkpoint_every=3)
            print("stopped early" if result.stopped_early else "finished", flush=True)
            os._exit(0)
        if interruption:
            name, rows, seconds = interruption.split(":")
            _wait_for_rows(run_dir / "metrics.jsonl", int(rows))
            time.sleep(float(seconds))
            os.kill(child, signal.Signals[name])
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _wait_for_rows(path: Path, rows: int) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.002)


if __name__ == "__main__":
    _interrupted(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
