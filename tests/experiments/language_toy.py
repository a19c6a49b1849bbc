"""Tiny text, and the language-modelling experiment called on it as a user calls it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from experiments.language_modeling.__main__ import main
from experiments.language_modeling.config import Config

from experiments import cli

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "old", "town", "people", "ran"]
STEPS = 12


def write_texts(folder: Path) -> Path:
    """Generic text with labels, half of it like the specific text (upper case)."""
    rng = np.random.default_rng(0)

    def lines(count: int, upper: bool) -> list[str]:
        made = [" ".join(rng.choice(WORDS, 8)) for _ in range(count)]
        return [line.upper() if upper else line for line in made]

    generic = [line for pair in zip(lines(150, False), lines(150, True), strict=True) for line in pair]
    (folder / "generic.txt").write_text("\n".join(generic) + "\n")
    (folder / "labels.tsv").write_text("lower\tx\n<script>UPPER\tx\n" * 150)
    (folder / "specific").mkdir()
    for part, count in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / "specific" / f"{part}.txt").write_text("\n".join(lines(count, True)) + "\n")
    return folder


def flags(data: Path, **given: object) -> list[str]:
    """The flags of a run of a few seconds."""
    chosen: dict[str, object] = {
        "steps": STEPS,
        "length": 16,
        "batch-size": 4,
        "big-batch-size": 16,
        "warmup": 2,
        "log-every": 4,
        "evaluate-every": 4,
        "checkpoint-every": 4,
        "run-dir": data / "run",
        "data.generic": data / "generic.txt",
        "data.specific": data / "specific",
        "data.cache-dir": data / "cache",
        "weights.mixing-fraction": 0.25,
        "weights.contrastive-fraction": 0.1,
        **{name.replace("__", ".").replace("_", "-"): value for name, value in given.items()},
    }
    return [x for name, value in chosen.items() for x in (f"--{name}", str(value))] + ["--no-progress"]


def call(data: Path, *more: str, **given: object) -> None:
    """The command, in this process."""
    cli.run(Config, main, [*flags(data, **given), *more])


def one_device_each() -> dict[str, str]:
    """The environment of a process with one device."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def call_together(*arguments: str) -> None:
    """The command as two hosts give it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "experiments.language_modeling", "--processes", "2", "--coordinator", address]
    processes = [
        subprocess.Popen(
            [*command, *arguments, "--process", str(i)], env=one_device_each(), stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
