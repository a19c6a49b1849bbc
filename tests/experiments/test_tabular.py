"""Labelled arrays in the classification experiment, as a user brings them."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.image_classification.__main__ import main
from experiments.image_classification.config import Config, DataConfig
from experiments.image_classification.data import open_sets, prepared

from bilevel.training.run_dir import read_settings
from experiments import cli
from experiments.tabular import DEFAULTS

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Integer features, one of them constant, in three named classes."""
    rng = np.random.default_rng(0)
    label = np.arange(150) % 3
    features = np.stack([rng.integers(0, 50, 150) + 100 * label, rng.integers(0, 9, 150), np.full(150, 7)], axis=1)
    np.savez(tmp_path / "rows.npz", features=features, label=np.asarray(["low", "middle", "top"])[label])
    return tmp_path / "rows.npz"


def call(*flags: str) -> None:
    """The command, in this process."""
    cli.run(Config, main, [*flags, "--no-progress"], default=DEFAULTS)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "comparison.json").read_text())


@pytest.mark.slow
def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    folder = tmp_path / "run"
    call("--steps", "4", "--weights.il-steps", "4", "--run-dir", str(folder))
    rows = results(folder)
    assert [row["method"] for row in rows] == ["uniform", "dds", "rho_loss"]
    assert all(math.isfinite(row["test_loss"]) for row in rows)
    settings = read_settings(folder / "dds-seed0")
    assert (settings["data"]["source"], settings["data"]["noise_fraction"]) == ("sklearn:breast_cancer", 0.2)
    assert not (folder / "dds-seed0" / "images.svg").exists()
    report = (folder / "report.html").read_text()
    assert "Classification with learned data weights" in report
    assert "rho_loss: scored by the classifier itself" in report


def test_arrays_are_learned(source: Path) -> None:
    """Features far from 0 and 1: standardised, they are learned in a few steps."""
    flags = ["--data.source", str(source), "--data.noise", "none", "--method", "uniform", "--steps", "100"]
    call(*flags, "--run-dir", str(source.parent / "run"))
    assert results(source.parent / "run")[0]["test_accuracy"] > 0.9


@pytest.mark.slow
def test_big_batches_of_few_rows(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """75 training rows, of which the big batch is 160 by default."""
    flags = ["--data.source", str(source), "--data.noise", "none", "--compare", "uniform,rho_loss", "--steps", "2"]
    call(*flags, "--weights.il-steps", "2", "--micro-batches", "2", "--run-dir", str(source.parent / "run"))
    uniform, rho = results(source.parent / "run")
    assert uniform["epochs"] == pytest.approx(2 * 16 / 75)
    assert rho["epochs"] == pytest.approx(2 * 74 / 75), "two equal parts"
    assert "warning: --big-batch-size 160 is more than the 75 training rows" in capsys.readouterr().err


def test_features_are_standardized_by_the_training_set(source: Path) -> None:
    config = DataConfig(source=str(source))
    sets = open_sets(config)
    data = prepared(config, sets)
    x, key = jnp.asarray(data.train.arrays["features"]), jax.random.key(0)
    found = np.asarray(data.plain(x, key))
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), [1, 1, 0], atol=1e-5)
    test = np.asarray(data.plain(jnp.asarray(data.test.arrays["features"]), key))
    assert 1e-3 < abs(test.mean(0)[0]) < 1, "by the training set's mean, not its own"
    plain = prepared(DataConfig(source=str(source), standardize=False), sets).plain
    np.testing.assert_array_equal(plain(x, key), x)


def test_mistakes_are_explained(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--model.network", "cnn"], "The network cnn needs images, but the data are rows of 3 features: take mlp."),
        (["--data.augment", "crop"], "--data.augment crop needs images, but"),
        (["--weights.scorer-network", "resnet18", "--method", "rho_loss"], "The network resnet18 needs images"),
        (["--data.label", "colour"], "the labels one of colour"),
    ]
    for i, (flags, message) in enumerate(cases):
        with pytest.raises(SystemExit) as stopped:
            call("--data.source", str(source), "--run-dir", str(source.parent / str(i)), *flags)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
