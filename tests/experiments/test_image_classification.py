"""The image-classification experiment end to end, as a user calls it, at tiny sizes."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.image_classification.__main__ import main
from experiments.image_classification.auxiliary import settings_of
from experiments.image_classification.build import optimizer_of
from experiments.image_classification.comparison import reached, targets_table
from experiments.image_classification.config import METHODS, NEWER, NEWER_DATA, SAMPLED, Config, DataConfig, ModelConfig
from experiments.image_classification.data import open_sets
from experiments.image_classification.faults import load_data
from experiments.image_classification.networks import NAMES, network_of
from experiments.image_classification.observation import shares_of
from experiments.image_classification.run import settings_dict
from experiments.image_classification.suite import run_suite
from image_toy import STEPS, call, config_of, final_state, killed_and_whole, metrics_of, quarters, results, stop_after

from bilevel.offline.loss_table import LossTable
from bilevel.types import UserError
from experiments import cli
from experiments.image_classification import known, pictures, suite

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quarters(tmp_path)


def test_comparison_writes_what_it_promises(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(source, compare="uniform,dds,rho_loss", targets="0.01")
    folder = source.parent / "run"
    rows = results(folder)
    assert [row["method"] for row in rows] == ["uniform", "dds", "rho_loss"]
    for row in rows:
        for name in ("seconds", "test_accuracy", "dev_accuracy", "test_loss", "corrupted_share", "best_test_accuracy"):
            assert math.isfinite(row[name]), name
        assert (row["seed"], row["steps"], row["steps_to"]) == (0, STEPS, {"0.01": 2})
    assert rows[0]["steps_to_uniform_best"] is not None
    train = len(load_data(config_of(source)).train)
    assert rows[0]["epochs"] == pytest.approx(STEPS * 4 / train)
    assert rows[2]["epochs"] == pytest.approx(STEPS * 16 / train)
    assert rows[2]["epochs_to"]["0.01"] == pytest.approx(2 * 16 / train, abs=1e-3)
    assert 0 < rows[1]["weight_on_corrupted"] < 1
    assert sum(rows[1][f"weight_share/{c}"] for c in range(4)) == pytest.approx(1)
    table = (folder / "comparison.md").read_text()
    assert table.strip() in capsys.readouterr().out
    lines = (folder / "dds-seed0" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [row["step"] for row in metrics] == [2, 4, 6]
    assert sum(metrics[-1][f"share/{c}"] for c in range(4)) == pytest.approx(1, abs=1e-5)
    assert (folder / "dds-seed0" / "images.svg").exists()
    report = (folder / "report.html").read_text()
    for title in ("Test accuracy", "Wrong labels among the selected rows", "images with the highest"):
        assert title in report
    assert "http://" not in report
    before = (folder / "dds-seed0" / "metrics.jsonl").stat().st_mtime_ns
    call(source, compare="uniform,dds,rho_loss", targets="0.01")
    assert (folder / "dds-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    call(source, "--eval-only", compare="dds")
    assert f"{rows[1]['test_accuracy']:.3f}" in capsys.readouterr().out


OF_THEIR_OWN = ("uniform", "dds", "rho_loss", *SAMPLED)
"""Methods that other tests run."""
LONG = ("mentornet", "spcl", "learning_to_reweight", "gradient_norm_is")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in LONG)) for m in METHODS if m not in OF_THEIR_OWN],
)
def test_every_method_runs(source: Path, method: str) -> None:
    call(source, *(["--resident", "never"] if method == "train_loss" else []), method=method, steps=2)
    row = results(source.parent / "run")[0]
    assert row["method"] == method
    assert math.isfinite(row["test_accuracy"])


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


def test_faults(source: Path) -> None:
    clean = open_sets(config_of(source).data).train.arrays["label"]

    def data(**given: Any) -> Any:
        given = {"noise_fraction": 0.5, **given}
        return load_data(config_of(source, data=given))

    pair = data(noise="pair")
    wrong = pair.known("corrupted")
    assert 0.4 < wrong.mean() < 0.6
    np.testing.assert_array_equal(pair.train.arrays["label"][wrong], (clean[wrong] + 1) % 4)
    np.testing.assert_array_equal(pair.known("clean_label"), clean)
    assert sorted(pair.train.arrays) == ["image", "label"], "learners read nothing else"
    assert not data(noise="none").marked("corrupted")
    half = data(relevant="half")
    assert set(half.dev.arrays["label"]) == set(half.test.arrays["label"]) == set(half.holdout.arrays["label"])
    assert len(set(half.test.arrays["label"])) == 2
    assert 0.3 < half.known("relevant").mean() < 0.7
    rare = np.bincount(data(noise="none", imbalance=10).train.arrays["label"])
    assert rare[0] > 5 * rare[3] > 0
    assert (data(noisy_holdout=True).holdout.arrays["label"] != data().holdout.arrays["label"]).any()
    np.savez(source.parent / "labels.npz", worse=np.zeros(240, np.int32))
    assert not data(noise=f"{source.parent / 'labels.npz'}:worse").train.arrays["label"].any()


@pytest.mark.parametrize("kind", ["uniform", "pair"])
def test_noise_keeps_to_the_classes_of_the_training_set(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "gaps.npz"
    np.savez(file, x=np.arange(120.0).reshape(60, 2), y=np.arange(60) % 2 * 4 + 1)
    data = load_data(config_of(file, data={"noise": kind, "noise_fraction": 1.0}))
    np.testing.assert_array_equal(data.train.arrays["label"], np.where(data.known("clean_label") == 1, 5, 1))


def test_recorded_labels_are_those_of_the_training_part(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
    np.savez(tmp_path / "human.npz", worse=np.zeros(30, np.int32))
    given = {"source": str(tmp_path), "noise": f"{tmp_path / 'human.npz'}:worse"}
    assert not load_data(config_of(tmp_path, data=given)).train.arrays["label"].any()
    with pytest.raises(UserError, match=r"from a validation part of its own: leave --data\.noisy-holdout out"):
        load_data(config_of(tmp_path, data={**given, "noisy_holdout": True}))


def test_shares_of_many_classes_are_left_out_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.npz"
    for classes in (20, 21):
        np.savez(file, x=np.arange(252.0).reshape(126, 2), y=np.arange(126) % classes)
        with pytest.raises(UserError, match="say what to replay"):
            run_suite(config_of(file, method="replayed"))
        said = capsys.readouterr().err
        assert said == ("Shares of classes are left out: 21 classes, more than 20.\n" if classes == 21 else "")
        assert bool(shares_of(load_data(config_of(file)))) == (classes == 20)


def test_no_held_out_rows_of_a_validation_part(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
    sizes = {share: open_sets(DataConfig(source=str(tmp_path), holdout=share)).holdout for share in (0, 0.2)}
    assert (sizes[0], len(sizes[0.2] or [])) == (None, 6)


def test_the_most_confused_classes(source: Path) -> None:
    config = config_of(source, data={"noise": "confused"})
    first, again = load_data(config), load_data(config)
    assert 0.3 < first.known("corrupted").mean() < 0.7
    np.testing.assert_array_equal(first.train.arrays["label"], again.train.arrays["label"])
    files = config.run_dir / "confusion"
    (kept,) = files.glob("*/confused.json")
    written = kept.stat().st_mtime_ns
    load_data(config_of(source, data={"noise": "confused", "seed": 1}))
    assert len(list(files.glob("*/confused.json"))) == 2, "other data are asked anew"
    assert kept.stat().st_mtime_ns == written
    assert set(json.loads(kept.read_text())) == {"settings", "pairs"}


def test_steps_to_accuracies() -> None:
    rows = [{"step": 1}, {"step": 2, "test_accuracy": 0.4}, {"step": 4, "test_accuracy": 0.8}]
    assert [reached(rows, x) for x in (0.3, 0.4, 0.5, 0.9)] == [2, 2, 4, None]
    found = [
        {"method": "a", "steps_to": {"0.5": s, "0.9": None}, "epochs_to": {"0.5": s / 10, "0.9": None}} for s in (2, 4)
    ]
    assert targets_table(found, (0.5, 0.9)).splitlines()[-1] == "| a | 3 ± 1 (0.3 ± 0.1) | – |"


def test_vgg16_without_batch_norm() -> None:
    plain, usual = (network_of(name, 10, (32, 32, 3), ModelConfig()) for name in ("vgg16-plain", "vgg16"))
    trees = [jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))) for net in (plain, usual)]
    assert ["batch_stats" in tree for tree in trees] == [False, True]


@pytest.mark.parametrize("name", [*NAMES, "wrn28-2"])
def test_networks_by_name(name: str) -> None:
    network = network_of(name, 10, (32, 32, 3), ModelConfig())
    shape = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda x: network.init({"params": key, "dropout": key}, x), shape)
    assert "head" in variables["params"], "the scorer's last layer begins at 0"


def test_rates_in_steps() -> None:
    """Warm-up, then a tenth of the rate from the third update on, and a hundredth from the fifth on."""
    config = Config(optimizer="sgd", learning_rate=1.0, momentum=0, weight_decay=0, schedule="step", milestones=(2, 4))
    for warmup, wanted in ((0, [1, 1, 0.1, 0.1, 0.01]), (1, [0, 1, 0.1, 0.1, 0.01])):
        moves = updates(dataclasses.replace(config, warmup=warmup), 5)
        np.testing.assert_allclose(moves, -np.asarray(wanted), rtol=1e-5)


def test_momentum_without_nesterov() -> None:
    """Gradients of 1: the second update is 1 + m, with Nesterov 1 + m + m²."""
    config = Config(optimizer="sgd", learning_rate=1.0, momentum=0.5, weight_decay=0)
    np.testing.assert_allclose(updates(config, 2), [-1.5, -1.75])
    np.testing.assert_allclose(updates(dataclasses.replace(config, nesterov=False), 2), [-1, -1.5])


def updates(config: Config, steps: int) -> list[float]:
    optimizer, x = optimizer_of(config, steps), jnp.zeros(())
    state, found = optimizer.init(x), []
    for _ in range(steps):
        move, state = optimizer.update(jnp.ones(()), state, x)
        found.append(float(jnp.asarray(move)))
    return found


def test_padding_of_crops(source: Path) -> None:
    """Cut out of reflections, every value is one of the image's own; zeros are its mean."""
    for mode, own in (("reflect", True), ("zero", False)):
        given = {"augment": "crop", "padding": 2, "padding_mode": mode}
        data = load_data(config_of(source, data=given))
        images = jnp.asarray(data.train.arrays["image"][:32])
        plain, cut = (np.asarray(f(images, jax.random.key(0))) for f in (data.plain, data.augmented))
        assert not np.array_equal(plain, cut)
        assert np.isin(cut, plain).all() == own


def test_runs_begun_before_a_flag_go_on(source: Path) -> None:
    """Settings of later flags count, but leave no trace where they say what was done before."""
    before = settings_dict(config_of(source), "dds", 0)
    assert not {*NEWER, *NEWER_DATA} & {*before, *before["data"]}
    data = load_data(config_of(source))
    fitted = settings_of(config_of(source), data, None, data.train)
    assert not {*NEWER, *NEWER_DATA} & {*fitted}
    changed: list[dict[str, Any]] = [
        {"nesterov": False}, {"schedule": "step", "milestones": (3,)}, {"decay": 0.5}, {"data": {"padding_mode": "reflect"}},
        {"data": {"padding": 2}}, {"data": {"standardize": False}},
    ]  # fmt: skip
    for given in changed:
        assert settings_dict(config_of(source, **given), "dds", 0) != before
        assert settings_of(config_of(source, **given), data, None, data.train) != fitted


def test_mistakes_are_explained(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"compare": "uniform,dss"}, 'names the method "dss", which does not exist'),
        ({"model__network": "resnet19"}, 'There is no network "resnet19": choose from mlp'),
        ({"data__noise": "salt"}, '--data.noise "salt" is unknown'),
        ({"data__noise": "labels.npz"}, "names no array: write FILE.npz:NAME"),
        ({"data__noise_fraction": 2}, "fraction"),
        ({"data__source": source.parent / "none.npz"}, "none.npz"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"targets": "2"}, "accuracies lie between 0 and 1"),
        ({"weights__svp_fraction": 0, "compare": "uniform,svp"}, "--weights.svp-fraction 0.0 must lie in (0, 1]"),
        ({"weights__burn_in": 2, "compare": "uniform,mentornet"}, "--weights.burn-in 2.0 must lie in [0, 1]"),
        ({"data__holdout": 0, "compare": "uniform,rho_loss"}, "has no held-out rows to learn irreducible losses from"),
        ({"weights__il_network": "vgg16", "compare": "uniform,rho_loss"}, "6 × 6"),
        ({"weights__svp_network": "resnet19", "compare": "uniform,svp"}, 'There is no network "resnet19"'),
        ({"average": 2, "compare": "uniform,dds"}, "--average 2.0 must lie in [0, 1)"),
        ({"batch_size": 200, "big_batch_size": 200}, "--batch-size 200 is more than the"),
        ({"big_batch_size": 2, "compare": "uniform,rho_loss"}, "--big-batch-size 2 is smaller than --batch-size 4"),
        ({"micro_batches": 3}, "--batch-size 4 cannot be divided into 3 equal parts"),
        ({"schedule": "step"}, "--schedule step without --milestones: give both"),
        ({"milestones": 5}, "--milestones 5 with --schedule constant: give both"),
        ({"schedule": "step", "milestones": 0}, "--milestones 0 must be numbers of steps from 1 on"),
        ({"schedule": "step", "milestones": 5, "decay": 0}, "--decay 0.0 must be positive"),
        ({"data__augment": "crop", "data__padding": -1}, "--data.padding -1 must be at least 0"),
        (
            {"data__augment": "crop", "data__padding": 6, "data__padding_mode": "reflect"},
            "smaller than the images, which",
        ),
        ({"warmup": -1}, "--warmup -1 must be at least 0"),
        ({"model__width": 0}, "--model.width 0 must be at least 1"),
        ({"model__network": "wrn28-0"}, "The width 0 of a wide ResNet must be at least 1"),
        ({"weights__table": source.parent / "no.npz", "method": "rho_loss"}, "There is no table of losses at"),
        ({"model__network": "resnet20", "data__source": "sklearn:iris"}, "needs images"),
        ({"data__dev": "inf"}, "dev=inf is not a number of its 240 rows"),
        ({"data__dev": "nan"}, "dev=nan is not a number of its 240 rows"),
        ({"micro_batches": 3, "compare": "uniform,rl_sampler"}, "cannot be divided into 3 equal parts"),
    ]
    for i, (given, message) in enumerate(cases):
        with pytest.raises(SystemExit) as stopped:
            call(source, run_dir=source.parent / str(i), **given)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (source.parent / str(i)).exists(), "before anything is trained"


@pytest.mark.slow
def test_other_data_in_the_same_file_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is done, or half done, is of the rows and labels that it read, whatever the file holds now."""
    call(source, method="uniform", run_dir=source.parent / "run")
    call(source, method="uniform", run_dir=source.parent / "run")
    with np.load(source) as arrays:
        image, label = arrays["image"], arrays["label"]
    np.savez(source, image=image, label=np.roll(label, 1))
    with pytest.raises(SystemExit):
        call(source, compare="uniform,spcl", run_dir=source.parent / "run")
    assert "holds a run with other settings (content_hash.train was" in capsys.readouterr().err


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


@pytest.mark.parametrize("channels", [2, 3, 4, 5])
def test_images_of_any_channels_are_drawn(channels: int) -> None:
    image = np.arange(4 * 4 * channels).reshape(4, 4, channels).astype(np.uint8)
    shown = pictures._colours(image)
    assert shown.shape == (4, 4, 3)
    expected = (
        image[..., :3] if channels in (3, 4) else np.repeat(image.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    )
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.slow
def test_tables_of_features(tmp_path: Path) -> None:
    call(tmp_path / "x", compare="dds,gradient_norm", data__source="sklearn:iris", steps=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "dds-seed0" / "images.svg").exists()
    assert len(results(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_killed_process_continues(source: Path) -> None:
    cut, whole = killed_and_whole(source, "dds", steps=1500)
    assert metrics_of(cut) == metrics_of(whole)


@pytest.mark.slow
def test_methods_do_what_the_papers_say(tmp_path: Path) -> None:
    """Digits, 40 % of the training labels wrong: see the README for the figures."""
    names, folder = "uniform,dds,rho_loss,train_loss", str(tmp_path / "run")
    cli.run(Config, main, ["--compare", names, "--run-dir", folder, "--no-progress"])
    uniform, dds, rho, loss = results(tmp_path / "run")
    assert dds["test_accuracy"] > uniform["test_accuracy"] + 0.05
    assert rho["steps_to_uniform_best"] < uniform["steps_to_uniform_best"]
    assert rho["corrupted_share"] < 0.1 < 0.5 < loss["corrupted_share"]
