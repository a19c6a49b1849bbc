"""Rows of features in the classification task, as a user brings them."""

import csv
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from commands import compare, refused
from tiny_images import config_of

from bilevel.cli import main
from bilevel.study import Text
from bilevel.tasks.classification import TABULAR

NAMES = ("low", "middle", "top")


def table() -> tuple[np.ndarray, np.ndarray]:
    """Integer features far from 0 and 1, one of them constant, in three classes."""
    rng, label = np.random.default_rng(0), np.arange(150) % 3
    columns = [rng.integers(0, 50, 150) + 100 * label, rng.integers(0, 9, 150), np.full(150, 7)]
    return np.stack(columns, axis=1), label


@pytest.fixture
def source(tmp_path: Path) -> Path:
    features, label = table()
    np.savez(tmp_path / "rows.npz", features=features, label=np.asarray(NAMES)[label])
    return tmp_path / "rows.npz"


def given(source: Path, **more: Any) -> dict[str, Any]:
    return {"data__source": source, "model__width": 8, "data__noise": "none", "compare": "uniform", **more}


def test_a_comparison_of_rows(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are learned in a few steps, with big batches of all 75 training rows; each measure is one of a constant column too."""
    more = {"compare": "uniform,train_loss", "steps": 60, "big_batch_size": 160, "micro_batches": 2}
    rows = compare("tabular", source.parent / "run", **given(source, **more, model__width=16, evaluate_every=60))
    assert [row["method"] for row in rows] == ["uniform", "train_loss"]
    assert all(math.isfinite(row[f"test_{m.name}"]) for row in rows for m in TABULAR.measures)
    assert "warning: --big-batch-size 160 is more than the 75 training rows" in capsys.readouterr().err
    assert rows[0]["test_accuracy"] > 0.8
    assert rows[0]["epochs"] == pytest.approx(60 * 4 / 75)
    assert rows[1]["epochs"] == pytest.approx(60 * 74 / 75), "two equal parts"
    report = (source.parent / "run" / "report.html").read_text()
    assert "Classification with learned data weights" in report
    assert "train_loss: scored by the target itself" in report


@pytest.mark.slow
def test_the_default_command(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    main(
        [
            "compare",
            "tabular",
            "--steps",
            "4",
            "--rho-loss.held-out-steps",
            "4",
            "--run-dir",
            str(tmp_path),
            "--no-progress",
        ]
    )
    folder = tmp_path / "dds-seed0"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["data"]["source"], settings["data"]["noise_fraction"]) == ("sklearn:breast_cancer", 0.2)
    assert "rho_loss: scored by the target itself" in (tmp_path / "report.html").read_text()


def test_a_table_of_a_spreadsheet(source: Path) -> None:
    """A CSV file with the label in a named column has the same rows as the arrays."""
    features, label = table()
    with (source.parent / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "kind"])
        writer.writerows([*row, NAMES[c]] for row, c in zip(features.tolist(), label, strict=True))
    arrays = TABULAR.open(config_of(source, noise="none"), source.parent)
    found = TABULAR.open(config_of(source.parent / "rows.csv", noise="none", label="kind"), source.parent)
    for name in ("features", "label"):
        np.testing.assert_array_equal(found.train.arrays[name], arrays.train.arrays[name])  # pyright: ignore
    assert found.known["class"].names == NAMES


def test_features_are_standardized_by_the_training_set(source: Path) -> None:
    splits = TABULAR.open(config_of(source), source.parent)
    x, key = jnp.asarray(splits.train.arrays["features"]), jax.random.key(0)  # pyright: ignore
    found = np.asarray(splits.plain(x, key))
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), [1, 1, 0], atol=1e-5)
    test = np.asarray(splits.plain(jnp.asarray(splits.test["test"].arrays["features"]), key))  # pyright: ignore
    assert 1e-3 < abs(test.mean(0)[0]) < 1, "by the training set's mean, not its own"
    as_they_are = TABULAR.open(config_of(source, standardize=False), source.parent)
    np.testing.assert_array_equal(as_they_are.plain(x, key), x)


def test_features_are_shown_as_text(source: Path) -> None:
    config = config_of(source, noise="none")
    splits = TABULAR.open(config, source.parent)
    shown = TABULAR.show(config, splits, np.asarray([4, 0]))
    rows, labels = (splits.train.arrays[name] for name in ("features", "label"))  # pyright: ignore
    for one, i in zip(shown, (4, 0), strict=True):
        assert isinstance(one, Text)
        assert [float(x) for x in one.text.split()] == rows[i].tolist()
        assert one.label == NAMES[labels[i]]


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "a network of images": ({"model__network": "cnn"}, "The network cnn needs images, but the data are rows of 3 features"),
    "augmented features": ({"data__augment": "crop"}, "--data.augment crop needs images, but"),
    "a proxy of images": ({"compare": "rho_loss", "rho_loss__network": "resnet18"}, "The network resnet18 needs images"),
    "no such label": ({"data__label": "colour"}, "the labels one of colour"),
    "no such data set": ({"data__source": "sklearn:flowers"}, "sklearn:flowers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = BAD_INPUT[case]
    assert message in refused("tabular", source.parent / "run", capsys, **given(source, **more))
