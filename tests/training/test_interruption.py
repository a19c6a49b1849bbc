"""Killing, stopping and continuing runs."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import training_toy
from training_toy import toy_state, toy_train

from bilevel.training import Checkpoints, read_metrics

STEPS = 18


def run_interrupted(run_dir: Path, *interruptions: str) -> list[str]:
    command = [sys.executable, "-W", "error", training_toy.__file__, str(run_dir), str(STEPS), *interruptions]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def final_state(run_dir: Path) -> Any:
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        restored = checkpoints.restore_latest(toy_state())
    assert restored is not None
    assert restored[0] == STEPS
    return restored[1]


def assert_bit_identical(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def without_seconds(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    seconds = [row.pop("seconds") for row in rows]
    assert seconds == sorted(seconds)
    return rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was never interrupted."""
    path = tmp_path_factory.mktemp("straight")
    assert run_interrupted(path) == ["finished", "ended 0"]
    return path


def test_killed_at_random_moments_ends_bit_identical(tmp_path: Path, straight: Path):
    chance = random.Random()  # other moments each time: that is the point; the moments are in the message
    moments = [f"SIGKILL:{rows}:{chance.uniform(0, 0.08):.3f}" for rows in (3, chance.randint(5, 8), 10)]
    moments += [f"SIGKILL:0:{chance.uniform(0, 1.2):.3f}"]  # while it starts
    output = run_interrupted(tmp_path / "killed", *moments)
    assert output[-2:] == ["finished", "ended 0"], moments
    assert output.count("ended -9") >= 2, (moments, output)
    assert_bit_identical(final_state(straight), final_state(tmp_path / "killed"))
    rows = without_seconds(tmp_path / "killed")
    np.testing.assert_equal(rows, without_seconds(straight))
    assert [row["step"] for row in rows] == sorted({*range(2, STEPS + 1, 2), *range(3, STEPS + 1, 3)})


def test_terminated_saves_and_continues(tmp_path: Path, straight: Path):
    output = run_interrupted(tmp_path / "run", "SIGTERM:4:0.03")
    assert output == ["stopped early", "ended 0", "finished", "ended 0"]
    assert_bit_identical(final_state(straight), final_state(tmp_path / "run"))


def raise_at(step: int, *numbers: signal.Signals) -> Any:
    """An `on_selected` that sends signals to this process at a step."""

    def on_selected(ids: np.ndarray, at: int) -> dict[str, float]:
        for number in numbers if at == step else ():
            signal.raise_signal(number)
        return {}

    return on_selected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stopped = toy_train(tmp_path, on_selected=raise_at(5, number))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert stopped.stopped_early
    assert int(stopped.state.step) == 6
    assert stopped.history[-1]["step"] == 6
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 6
    rest = toy_train(tmp_path)
    straight = toy_train(None)
    assert not rest.stopped_early
    assert_bit_identical(rest.state, straight.state)


def test_a_signal_in_the_last_evaluation_is_not_lost(tmp_path: Path):
    """The run is complete, but what would come after it must not begin."""
    steps = int(toy_train(None).state.step)
    done = toy_train(tmp_path, on_selected=raise_at(steps, signal.SIGTERM))
    assert (done.stopped_early, done.stop_requested) == (False, True)
    again = toy_train(tmp_path)
    assert (again.stopped_early, again.stop_requested) == (False, False)
    assert_bit_identical(again.state, done.state)


def test_second_interrupt_raises(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, on_selected=raise_at(5, signal.SIGINT, signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) == before


def test_trains_outside_the_main_thread():
    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(int(toy_train(None).state.step)))
    thread.start()
    thread.join()
    assert steps == [30]


def test_a_signal_while_all_is_closed_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    close = Checkpoints.close

    def closed_late(self: Checkpoints) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", closed_late)
    assert toy_train(tmp_path).stop_requested


def test_ctrl_c_that_ends_the_reader_of_the_output_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`… 2>&1 | tee log`: tee dies with the same key, and what is written then raises."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    before, (reads, writes) = os.dup(2), os.pipe()
    os.close(reads)
    os.dup2(writes, 2)
    try:
        stopped = toy_train(tmp_path, on_selected=raise_at(5, signal.SIGINT), progress=True)
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writes)
    assert stopped.stopped_early
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 6
