"""`bilevel compare` as a user calls it: in this process, or in one that is killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_calls import environment

from bilevel.cli import main
from bilevel.study import run

RHYTHM = {"steps": 6, "batch-size": 4, "big-batch-size": 16, "log-every": 2, "evaluate-every": 4, "checkpoint-every": 4}
DYING = """
import os, signal, sys
import pytest
from tiny_pictures import shrink_towers
from tiny_text import shrink
from bilevel.cli import main
from bilevel.study import run

evaluated = run.trained

def dying(state, mesh):
    if int(getattr(state, "train", state).step) >= int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluated(state, mesh)

run.trained = dying
shrink(pytest.MonkeyPatch())
shrink_towers(pytest.MonkeyPatch())
main(sys.argv[2:])
"""


def flags(run_dir: Path, **given: Any) -> list[str]:
    """Flags of a run of a second: `data__length=16` is --data.length 16, and True a flag without a value."""
    chosen = {**RHYTHM, "run-dir": run_dir} | {
        name.replace("__", ".").replace("_", "-"): value for name, value in given.items()
    }
    found = [
        part
        for name, value in chosen.items()
        for part in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
    ]
    return [*found, "--no-progress"]


def compare(task: str, run_dir: Path, **given: Any) -> list[dict[str, Any]]:
    """Call the command; returns the rows of its comparison."""
    main(["compare", task, *flags(run_dir, **given)])
    return results(run_dir)


def results(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "comparison.json").read_text())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run, without their seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def refused(task: str, run_dir: Path, capsys: pytest.CaptureFixture[str], **given: Any) -> str:
    """Call a command that must be refused before anything is trained; returns its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["compare", task, *flags(run_dir, **given)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    (message,) = [line for line in error.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert message.startswith("error: ")
    assert not list(run_dir.glob("*/checkpoints")), "before anything is trained"
    return message


def last_state(task: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[np.ndarray]:
    """Call the command, and return all arrays of the last state of its last run."""
    kept: list[Any] = []
    train = run.train
    with monkeypatch.context() as patched:
        patched.setattr(run, "train", lambda *a, **k: kept.append(train(*a, **k)) or kept[-1])
        main(["compare", task, *flags(run_dir, **given)])
    leaves = jax.tree.leaves(kept[-1].state)
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(leaves, keys, strict=True)]


def equal_after_a_kill(task: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Path, Path]:
    """Kill a process in step 12 of 14, call the command again, and compare with a run that is left alone, bit for bit.

    Checkpoints are written beside the training: that of step 4 is whole when that of step 8 begins.
    """
    given = {"steps": 14, "steps_per_call": 4, **given}
    killed, whole = folder / "killed", folder / "whole"
    command = [sys.executable, "-c", DYING, "12", "compare", task, *flags(killed, **given)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(killed.glob("*/checkpoints/4")), "it was killed after a checkpoint"
    assert not list(killed.glob("*/result.json"))
    states = [last_state(task, path, monkeypatch, **given) for path in (killed, whole)]
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)
    return killed, whole
