"""Two local processes train together: one run directory, one set of checkpoints, one decision to stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import process_toy
import pytest
from training_toy import toy_train

from bilevel.training import read_metrics


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if not line.startswith("[Gloo]")]


def test_two_processes(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, process_toy.__file__]
    processes = [
        subprocess.Popen(
            [*command, str(index), port, str(tmp_path / "run")],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Asked to stop at step 10, they agree at the next row; the damaged checkpoint of step 15 is passed over.
    assert said(outputs[0][0]) == ["first True 15", "second False 30 6"]
    assert said(outputs[1][0]) == ["first True 15", "second False 30 4"]
    assert "the checkpoint of step 15" in outputs[0][1]

    alone = toy_train(None, on_selected=lambda ids, step: {"id": float(ids.mean())})
    final = np.load(tmp_path / "run" / "final.npz")
    for name, value in alone.state.params.items():
        np.testing.assert_allclose(final[name], value, rtol=1e-5)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    for row, expected in zip(rows, alone.history, strict=True):
        assert row["id"] == expected["id"]
        assert row["generic_loss"] == pytest.approx(expected["generic_loss"], rel=1e-4)
