"""A finished run, a corpus of three files, and `bilevel select` on them; its fixtures are imported by conftest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from bilevel import cli

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "över", "old", "town", "people", "ran"]
KILL_AFTER_WRITES = """
import os, signal, pyarrow.parquet as pq
written, original = 0, pq.ParquetWriter.write_table
def write_table(self, *given, **more):
    global written
    original(self, *given, **more)
    written += 1
    if written == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
pq.ParquetWriter.write_table = write_table
"""


def three_files() -> list[list[str]]:
    """Lines of 1 to 40 words; blank ones at the beginning and the end; several with one score."""
    rng = np.random.default_rng(0)
    found = [[" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)] for count in (30, 20, 25)]
    found[0][3] = found[1][0] = ""
    found[2][-1] = "  "
    for lines in found:
        lines[5:8] = ["one and the same"] * 3
    return found


def flags(run: Path, corpus: object, output: Path, **given: object) -> list[str]:
    chosen = {"weights": run, "corpus": corpus, "output": output, "batch-size": 64, **given}
    named = [x for name, value in chosen.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    return [*named, "--no-progress"]


def select(*given: Any, **more: object) -> None:
    cli.main(["select", *flags(*given, **more)])


def everything(output: Path) -> dict[str, str]:
    """A digest of each file of a selection; temporary ones and what executors leave are left out."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if path.relative_to(output).parts[0] != "executor"]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def code_of(command: list[str], log: Path, grace: float = 0.0, **environment: str) -> int:
    """Run a command to its end and return its exit code; what it started is killed `grace` seconds later."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            return process.wait(timeout=240)
        finally:
            time.sleep(grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
