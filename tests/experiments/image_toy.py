"""Tiny images, and the image-classification experiment called on them as a user calls it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.image_classification.__main__ import main
from experiments.image_classification.config import Config, DataConfig, MethodConfig, ModelConfig
from experiments.image_classification.faults import load_data

from experiments import cli
from experiments.image_classification import run

STEPS = 6
TRAIN = run.train


def quarters(folder: Path) -> Path:
    """A file of 240 images of 6 × 6 pixels in 4 classes: a bright quarter."""
    rng = np.random.default_rng(0)
    label = np.arange(240) % 4
    images = rng.integers(0, 60, (240, 6, 6, 1))
    for row, c in enumerate(label):
        images[row, 3 * (c // 2) : 3 * (c // 2) + 3, 3 * (c % 2) : 3 * (c % 2) + 3] += 150
    np.savez(folder / "quarters.npz", image=images.astype(np.uint8), label=label)
    return folder / "quarters.npz"


def flags(source: Path, **given: object) -> list[str]:
    chosen: dict[str, object] = {
        "steps": STEPS,
        "batch-size": 4,
        "big-batch-size": 16,
        "log-every": 2,
        "evaluate-every": 2,
        "checkpoint-every": 2,
        "steps-per-call": 2,
        "run-dir": source.parent / "run",
        "optimizer": "sgd",
        "data.source": source,
        "model.width": 16,
        "weights.il-steps": 4,
        **{name.replace("__", ".").replace("_", "-"): value for name, value in given.items()},
    }
    return [x for name, value in chosen.items() for x in (f"--{name}", str(value))] + ["--no-progress"]


def call(source: Path, *more: str, **given: object) -> None:
    """The command, in this process."""
    cli.run(Config, main, [*flags(source, **given), *more])


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "comparison.json").read_text())


def config_of(source: Path, **given: Any) -> Config:
    """What `flags` stand for."""
    same = {"data": {"source": str(source)}, "model": {"width": 16}, "weights": {"il_steps": 4}}
    kinds = {"data": DataConfig, "model": ModelConfig, "weights": MethodConfig}
    parts: dict[str, Any] = {name: kind(**{**same[name], **given.pop(name, {})}) for name, kind in kinds.items()}
    own: dict[str, Any] = {
        "steps": STEPS, "batch_size": 4, "big_batch_size": 16, "log_every": 2, "evaluate_every": 2, "checkpoint_every": 2,
        "steps_per_call": 2, "optimizer": "sgd", "progress": False, "run_dir": source.parent / "run",
    }  # fmt: skip
    return Config(**{**own, **given}, **parts)


def final_state(config: Config, method: str, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Runs, and returns all arrays of the last state."""
    kept: list[Any] = []
    monkeypatch.setattr(run, "train", lambda *a, **k: kept.append(TRAIN(*a, **k)) or kept[-1])
    run.run(config, method, 0, load_data(config))
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(kept[-1].state)]
    found = zip(jax.tree.leaves(kept[-1].state), keys, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in found]


def stop_after(steps: int, config: Config, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, and is stopped by a signal."""

    def stop(*a: Any, **k: Any) -> Any:
        result = TRAIN(*a, **{**k, "config": dataclasses.replace(k["config"], num_steps=steps)})
        return result._replace(stop_requested=True)

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(run.Stopped):
        run.run(config, method, 0, load_data(config))


def killed_and_whole(source: Path, method: str, **given: object) -> tuple[Path, Path]:
    """The directories of a run whose process is killed while it trains and started again, and of one that is left alone."""
    rhythm = {"log_every": 20, "evaluate_every": 500, "checkpoint_every": 100, "steps_per_call": 2}
    arguments = flags(source, method=method, **{**rhythm, **given})
    command = [sys.executable, "-m", "experiments.image_classification", *arguments]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    cut, whole = (source.parent / name / f"{method}-seed0" for name in ("run", "whole"))
    metrics = cut / "metrics.jsonl"
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 10):
            pass
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert not (cut / "result.json").exists()
    for more in ([], ["--run-dir", str(whole.parent)]):
        subprocess.run([*command, *more], cwd=root, env=environment, check=True, stdout=subprocess.PIPE, timeout=250)
    return cut, whole


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics, without their seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]
