"""The command `bilevel compare` on the linear task, as a user gives it, and what it leaves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel import cli
from bilevel.files import load_tree

TASK = Path(__file__).with_name("linear_task.py")
STEPS = 8
CLASSES = ("--data.classes", "2", "--model.network", "classes")


def call(folder: Path, compare: str, *flags: str | Path | float, task: Path = TASK) -> None:
    """The command, in this process."""
    cli.main(["compare", str(task), "--compare", compare, "--run-dir", str(folder), *map(str, flags)])


def fails(folder: Path, compare: str, *flags: str | Path | float, task: Path = TASK) -> None:
    """The command ends with a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        call(folder, compare, *flags, task=task)
    assert stop.value.code == 2


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "comparison.json").read_text())


def runs(folder: Path) -> list[tuple[str, int]]:
    return [(row["method"], row["seed"]) for row in rows(folder)]


def result(folder: Path, method: str, seed: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{method}-seed{seed}" / "result.json").read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_result(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs ended alike, bit for bit, but for the time they took."""
    times = ("seconds", "preparation_seconds")
    return {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}


def weights(run: Path) -> np.ndarray:
    """The logits of the three domains."""
    tree, _ = load_tree(run / "weights.safetensors", {"of": np.zeros(3, np.float32)})
    return np.asarray(tree["of"])


def changed(folder: Path, old: str, new: str) -> Path:
    """The task in a file of its own, with another line."""
    text = TASK.read_text()
    assert old in text
    file = folder / "my_task.py"
    file.write_text(text.replace(old, new))
    return file


def environment() -> dict[str, str]:
    """Of a process with one device."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join((str(TASK.parents[2]), str(TASK.parent))),
    }


def two_processes(*command: str | Path | float) -> None:
    """Start a command of bilevel as two hosts do, and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = ("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.processes", "2")
    whole = [sys.executable, "-m", "bilevel.cli", *map(str, command), *hosts]
    started = [
        subprocess.Popen([*whole, "--hosts.process", str(i)], env=environment(), stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [process.communicate()[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error
