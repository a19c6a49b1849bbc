"""The image-classification experiment end to end, as a user calls it, at tiny sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.image_classification.comparison import reached, targets_table
from experiments.image_classification.config import METHODS, SAMPLED, Config
from experiments.image_classification.faults import load_data
from experiments.image_classification.observation import shares_of
from experiments.image_classification.suite import run_suite
from image_toy import call, config_of, final_state, quarters, results, stop_after

from bilevel.offline.loss_table import LossTable
from bilevel.types import UserError
from experiments.image_classification import known, suite

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quarters(tmp_path)


OF_THEIR_OWN = ("uniform", "dds", "rho_loss", *SAMPLED)
"""Methods that other tests run."""
LONG = ("mentornet", "spcl", "learning_to_reweight", "gradient_norm_is")


FAST = ("uniform", "dds", "spcl", "rho_loss")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in METHODS if m not in SAMPLED],
)
def test_a_continued_run_equals_an_uninterrupted_one(
    source: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, bit for bit; the second start finds the checkpoint of step 2, the table and the pictures.

    Methods that sample by row numbers: test_image_samplers.
    """
    average = 0.9 if method == "uniform" else 0.0
    config = config_of(source, steps=4, average=average, run_dir=source.parent / "whole")
    whole = final_state(config, method, monkeypatch)
    cut = dataclasses.replace(config, run_dir=source.parent / "cut")
    stop_after(2, cut, method, monkeypatch)
    for x, y in zip(whole, final_state(cut, method, monkeypatch), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_table_of_irreducible_losses(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept in the run directory; taken by another run on the same data; refused for other data or settings."""
    folder = source.parent / "run"
    call(source, method="rho_loss", steps=2)
    table = folder / "irreducible" / "table.safetensors"
    data = load_data(config_of(source))
    kept = LossTable.load(table, content_hash=data.train.content_hash, settings=None)
    assert kept.losses.shape == (len(data.train),)
    assert np.isfinite(kept.losses).all()
    written = table.stat().st_mtime_ns
    call(source, compare="rho_loss,irreducible_loss", steps=2)
    assert table.stat().st_mtime_ns == written
    again = source.parent / "again"
    call(source, method="rho_loss", steps=2, run_dir=again, weights__table=table, data__holdout=0.2)
    assert not (again / "irreducible").exists()
    assert results(again)[0]["test_loss"] == pytest.approx(results(folder)[0]["test_loss"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(source, method="rho_loss", run_dir=source.parent / "b", weights__table=table, data__noise_fraction=0.1)
    assert "holds losses of data with the content hash" in capsys.readouterr().err
    named = LossTable(kept.losses, kept.content_hash, {**kept.settings, "number": "entropy"})
    named.save(source.parent / "entropies.npz")
    with pytest.raises(SystemExit):
        call(source, method="rho_loss", run_dir=source.parent / "c", weights__table=source.parent / "entropies.npz")
    assert "holds the entropy of each row, not irreducible losses" in capsys.readouterr().err
    other = config_of(source, weights={"il_steps": 5})
    with pytest.raises(UserError, match="was made with steps=4 in place of 5"):
        known.irreducible_losses(other, data, folder / "irreducible")
    moved = load_data(config_of(source, data={"dev": 20, "split": "last", "test": 0.2}))
    assert moved.dev.content_hash != data.dev.content_hash
    mixed = dataclasses.replace(data, dev=moved.dev)
    with pytest.raises(UserError, match=f"was made with dev='{data.dev.content_hash}' in place of"):
        known.irreducible_losses(config_of(source), mixed, folder / "irreducible")
    old = {name: value for name, value in kept.settings.items() if name != "dev"}
    LossTable(kept.losses, kept.content_hash, old).save(table)  # as it was before dev was recorded
    np.testing.assert_array_equal(
        known.irreducible_losses(config_of(source), mixed, folder / "irreducible").losses, kept.losses
    )


def test_irreducible_losses_without_held_out_rows(source: Path) -> None:
    weights = {"no_holdout": True, "il_network": "mlp-small"}
    config = config_of(source, data={"holdout": 0}, weights=weights)
    data = load_data(config)
    assert data.holdout is None
    table = known.irreducible_losses(config, data, config.run_dir / "irreducible")
    assert np.isfinite(table.losses).all()
    again = known.irreducible_losses(config, data, config.run_dir / "irreducible")
    np.testing.assert_array_equal(table.losses, again.losses)
    assert again.settings["network"] == "mlp-small"
    with pytest.raises(UserError, match=r"no held-out rows to learn irreducible losses from: give --data\.holdout"):
        known.irreducible_losses(config_of(source, data={"holdout": 0}), data, config.run_dir)


def test_shares_of_many_classes_are_left_out_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.npz"
    for classes in (20, 21):
        np.savez(file, x=np.arange(252.0).reshape(126, 2), y=np.arange(126) % classes)
        with pytest.raises(UserError, match="say what to replay"):
            run_suite(config_of(file, method="replayed"))
        said = capsys.readouterr().err
        assert said == ("Shares of classes are left out: 21 classes, more than 20.\n" if classes == 21 else "")
        assert bool(shares_of(load_data(config_of(file)))) == (classes == 20)


def test_steps_to_accuracies() -> None:
    rows = [{"step": 1}, {"step": 2, "test_accuracy": 0.4}, {"step": 4, "test_accuracy": 0.8}]
    assert [reached(rows, x) for x in (0.3, 0.4, 0.5, 0.9)] == [2, 2, 4, None]
    found = [
        {"method": "a", "steps_to": {"0.5": s, "0.9": None}, "epochs_to": {"0.5": s / 10, "0.9": None}} for s in (2, 4)
    ]
    assert targets_table(found, (0.5, 0.9)).splitlines()[-1] == "| a | 3 ± 1 (0.3 ± 0.1) | – |"


def test_a_comparison_goes_on_without_a_run_that_diverged(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained, original = source.parent / "run", [], suite.run

    def run(config: Config, method: str, *more: Any) -> dict[str, Any]:
        trained.append(method)
        rate = 1e30 if method == "spcl" else config.learning_rate
        return original(dataclasses.replace(config, learning_rate=rate), method, *more)

    monkeypatch.setattr(suite, "run", run)
    for evaluate_every in (2, 3):  # the second start trains nothing again
        with pytest.raises(SystemExit) as stopped:
            call(source, compare="spcl,uniform,dds", evaluate_every=evaluate_every)
        assert stopped.value.code == 2
        out, error = capsys.readouterr()
        assert f"error: 1 of the runs diverged and are dashes in the tables ({folder / 'spcl-seed0'})" in error
        assert f"Delete {folder / 'spcl-seed0' / 'diverged.json'} to train it again." in error
        assert "| spcl | 0 of 1 | – |" in out
        assert "| dds | 1 | 0." in out
    assert trained == ["spcl", "uniform", "dds", "uniform", "dds"]
    assert "dds" in (folder / "report.html").read_text()
    (folder / "spcl-seed0" / "diverged.json").unlink()
    with pytest.raises(SystemExit):
        call(source, compare="spcl,uniform")
    assert trained[5:] == ["spcl", "uniform"]
