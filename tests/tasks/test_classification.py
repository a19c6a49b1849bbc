"""Classification of images: what is made wrong with the data, the networks, and each method for a few steps."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import compare, equal_after_a_kill, metrics_of, refused, results
from tiny_images import clean_sets, config_of, digit_flags, image_flags, quarters, rows_of
from traced import fitting, setting_of, trace

from bilevel import cli
from bilevel.cli import main
from bilevel.data.labelled import mosaic
from bilevel.offline.loss_table import LossTable
from bilevel.offline.ranked_rows import logits_of_rows
from bilevel.study import Known, ModelOptions, Picture, Weighting, resolve, weights
from bilevel.study.run import Run
from bilevel.tasks.classification import TASK, ModelConfig, Rows
from bilevel.types import UserError

pytest.importorskip("sklearn")
DIGITS = "sklearn:digits"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quarters(tmp_path)


# -- as a user calls it ----------------------------------------------------------------------------------------------


def test_a_comparison_of_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, given = tmp_path / "run", digit_flags(compare="uniform,dds")
    rows = compare("image_classification", folder, **given)
    assert [row["method"] for row in rows] == ["uniform", "dds"]
    for row in rows:
        for name in (
            "seconds",
            "test_accuracy",
            "valid_accuracy",
            "test_loss",
            "share/wrong_label",
            "best_test_accuracy",
        ):
            assert math.isfinite(row[name]), name
        assert (row["seed"], row["steps"], list(row["steps_to"])) == (0, 6, ["0.01"])
    train = len(rows_of(DIGITS, tmp_path, limit=200).train)
    assert rows[0]["epochs"] == pytest.approx(6 * 4 / train)
    assert 0 < rows[1]["weight_on/wrong_label"] < 1
    table = (folder / "comparison.md").read_text()
    assert table.strip() in capsys.readouterr().out
    metrics = metrics_of(folder / "dds-seed0")
    assert [row["step"] for row in metrics] == [2, 4, 6]
    assert sum(metrics[-1][f"share/{c}"] for c in range(10)) == pytest.approx(1, abs=1e-5)
    report = (folder / "report.html").read_text()
    for title in ("Test accuracy", "Wrong label among the selected rows", "rows with the highest weights"):
        assert title in report
    assert "data:image/svg+xml;base64" in report


@pytest.mark.slow
def test_a_killed_run_ends_like_one_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = digit_flags(compare="dds", optimizer__average=0.9)
    killed, whole = equal_after_a_kill("image_classification", tmp_path, monkeypatch, **given)
    assert metrics_of(killed / "dds-seed0") == metrics_of(whole / "dds-seed0")


def test_the_papers_experiment(tmp_path: Path) -> None:
    """Wang et al., section 4.1 and appendix A.4; on other rows and a smaller network it runs."""
    found = cli.parse(["compare", "image_classification", "--preset", "dds_cifar10"]).settings
    study, data, model, dds = found.study, found.task.data, found.task.model, found.methods["dds"]
    assert (study.steps, study.batch_size) == (200_000, 128)
    o = study.optimizer
    assert (o.name, o.learning_rate, o.schedule, o.warmup, o.average) == ("sgd", 0.1, "cosine", 2000, 0.999)
    assert (data.source, data.limit, data.split, data.specific_rows, data.noise) == (
        "tfds:cifar10",
        4000,
        "last",
        400,
        "none",
    )
    assert (model.network, model.weighting_labels, model.weighting_bound) == ("wrn28-2", False, 0.0)
    assert (dds.mode, dds.estimator, dds.weight_learning_rate, dds.probe_blocks) == ("dense", "uniform", 3e-4, 0)
    given = {
        "preset": "dds_cifar10", "compare": "dds", "data__source": DIGITS, "data__limit": 200, "data__specific_rows": 40,
        "data__padding": 1, "model__network": "mlp-small", "batch_size": 8, "steps": 2, "model__width": 8,
    }  # fmt: skip
    (row,) = compare("image_classification", tmp_path / "run", **given)
    assert math.isfinite(row["test_loss"])


def test_a_part_of_the_parameters_is_probed(tmp_path: Path) -> None:
    """By flags alone: the step on digits is traced, with the specific gradient kept for the last block and the head."""
    given = {"data": {"source": DIGITS, "limit": 200}, "model": {"network": "mlp-small", "width": 16}}
    for blocks in (0, 1):
        setting = setting_of(TASK, tmp_path, given, {"dds": {"probe_blocks": blocks, "probe_every": 2}})
        trace(setting, "dds")
        plan = Run(setting.context("dds", 0)).plan
        state = jax.eval_shape(plan.init, *jax.random.split(jax.random.key(0), 3))
        kept = [x for x in jax.tree.leaves(state.method_state.specific_gradient) if x.size]
        assert len(kept) == (4 if blocks else 8), "kernels and biases"
        assert plan.step.period == 2
    wrong = setting_of(TASK, tmp_path, given, {"dds": {"probe_blocks": 4}})
    with pytest.raises(
        UserError, match=r"--dds.probe-blocks 4: the last 4 blocks of a network that has 3: give 1 to 3\."
    ):
        Run(wrong.context("dds", 0))
    assert resolve.default_config(TASK).methods["dds"].probe_blocks == 0, "all, where no flag says otherwise"


def test_every_method_can_be_trained_on_digits(tmp_path: Path) -> None:
    """Its step on batches of images is traced; on the linear task all of them run."""
    given = {"data": {"source": DIGITS, "limit": 200}, "model": {"network": "mlp-small", "width": 8}}
    setting = setting_of(TASK, tmp_path, given, {"contrastive": {"fraction": 0.1}})
    for method in fitting(setting):
        trace(setting, method)


def test_uniform_trains_on_all_images(source: Path) -> None:
    """Those of the specific and of the held-out set too, where labels are right."""
    given = {"data": {"source": str(source)}, "model": {"width": 8}}
    setting = setting_of(TASK, source.parent / "run", given, {"uniform": {"also": ["held_out", "specific"]}})
    plan = Run(setting.context("uniform", 0)).plan
    splits = setting.splits
    assert plan.rows is not None
    assert splits.held_out is not None
    found, sets = plan.rows(), (splits.train, splits.held_out, splits.specific)
    wanted = np.concatenate([rows.rows(np.arange(len(rows)))["image"] for rows in sets])
    np.testing.assert_array_equal(found.rows(np.arange(len(found)))["image"], wanted)


@pytest.mark.slow
def test_a_network_with_batch_norm_learns_weights(source: Path) -> None:
    """Its running statistics are evaluated; the weighting network normalises by the rows scored together."""
    given = image_flags(source, compare="dds,rho_loss", rho_loss__held_out_steps=2, steps=2, model__network="wrn10-1")
    dds, rho = compare("image_classification", source.parent / "run", **given)
    assert math.isfinite(dds["test_loss"])
    assert "BatchNorm by the statistics of the rows scored together" in rho["scored_by"]


@pytest.mark.slow
def test_methods_do_what_the_papers_say(tmp_path: Path) -> None:
    """The default command on 1,797 digits, 40 % of the training labels wrong."""
    main(["compare", "image_classification", "--compare", "uniform,dds,rho_loss,train_loss", "--no-progress",
          "--run-dir", str(tmp_path)])  # fmt: skip
    uniform, dds, rho, loss = results(tmp_path)
    assert dds["test_accuracy"] > uniform["test_accuracy"] + 0.05
    assert rho["test_accuracy"] > uniform["test_accuracy"] + 0.2
    assert rho["steps_to_uniform_best"] < uniform["steps_to_uniform_best"]
    assert rho["share/wrong_label"] < 0.1 < 0.5 < loss["share/wrong_label"]


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"compare": "uniform,dss"}, '--compare names the method "dss", which does not exist'),
    "unknown network": ({"model__network": "resnet19"}, 'There is no network "resnet19": choose from mlp'),
    "unknown noise": ({"data__noise": "salt"}, '--data.noise "salt" is unknown: give none, uniform, pair, confused'),
    "noise without an array": ({"data__noise": "labels.npz"}, "--data.noise labels.npz names no array: write FILE.npz:"),
    "too much noise": ({"data__noise_fraction": 2}, "--data.noise-fraction 2.0 must lie in [0, 1]"),
    "more of the last class": ({"data__imbalance": 0.5}, "--data.imbalance 0.5 must be at least 1"),
    "no confusion": ({"data__noise": "confused", "data__confusion_steps": 0}, "--data.confusion-steps 0 must be at least"),
    "missing file": ({"data__source": "none.npz"}, "no labelled data at none.npz (--data.source, "),
    "infinite specific rows": ({"data__specific_rows": "inf"}, "--data.specific-rows inf must be a number of rows"),
    "no specific rows": ({"data__specific_rows": "nan"}, "--data.specific-rows nan must be a number of rows"),
    "a broken number of rows": ({"data__test": 1.5}, "--data.test 1.5 must be a number of rows"),
    "no rows at all": ({"data__limit": 0}, "--data.limit 0 must be at least 1"),
    "negative seed": ({"data__seed": -1}, "--data.seed -1 must be at least 0"),
    "a batch of more than all": ({"batch_size": 200, "big_batch_size": 200}, "200"),
    "b > B": ({"big_batch_size": 2, "compare": "uniform,train_loss"}, "--big-batch-size 2 is smaller than --batch-size 4"),
    "parts of a batch": ({"micro_batches": 3}, "--batch-size 4 cannot be divided into 3 equal parts"),
    "parts of a sampled batch": ({"micro_batches": 3, "compare": "rl_sampler"}, "cannot be divided into 3 equal parts"),
    "a method beside a wrong one": ({"compare": "uniform,svp", "svp__fraction": 0}, "--svp.fraction 0.0 must lie in (0, 1]"),
    "an unknown proxy": ({"compare": "svp", "svp__network": "resnet19"}, 'There is no network "resnet19"'),
    "a burn-in of two runs": ({"compare": "mentornet", "mentornet__burn_in": 2}, "--mentornet.burn-in 2.0 must lie in"),
    "blocks": (
        {"compare": "soba", "soba__probe_blocks": 9},
        "--soba.probe-blocks 9: the last 9 blocks of a network that has 3: give 1 to 3.",
    ),
    "no held-out rows": (
        {"data__held_out": 0, "compare": "rho_loss"},
        "has no held-out rows to learn irreducible losses from: give --data.held-out a share, or --rho-loss.halves",
    ),
    "no held-out rows to train on": (
        {"data__held_out": 0, "compare": "uniform", "uniform__also": "held_out"},
        "--uniform.also held_out: ",
    ),
    "a held-out network of larger images": ({"compare": "rho_loss", "rho_loss__held_out_network": "vgg16"}, "6 × 6"),
    "no table": ({"compare": "rho_loss", "rho_loss__table": "no.safetensors"}, "--rho-loss.table: There is no table"),
    "negative padding": (
        {"data__augment": "crop", "data__padding": -1},
        "--data.padding -1 with --data.padding-mode zero must be at least 0",
    ),
    "padding of more than the image": (
        {"data__augment": "crop", "data__padding": 6, "data__padding_mode": "reflect"},
        "smaller than the images, which have 6 × 6 pixels",
    ),
    "no width": ({"model__width": 0}, "--model.width 0 must be at least 1"),
    "a wide network of no width": ({"model__network": "wrn28-0"}, "The width 0 of a wide ResNet must be at least 1"),
    "images wanted": ({"model__network": "resnet20", "data__source": "sklearn:iris"}, "needs images"),
    "no average": ({"optimizer__average": 2}, "--optimizer.average 2.0 must be less than 1"),
    "steps without milestones": ({"optimizer__schedule": "step"}, "No --optimizer.milestones with --optimizer.schedule step"),
    "milestones without steps": ({"optimizer__milestones": 5}, "--optimizer.milestones 5 with --optimizer.schedule const"),
    "a milestone at the start": (
        {"optimizer__schedule": "step", "optimizer__milestones": 0},
        "--optimizer.milestones 0 must be numbers of steps from 1 on",
    ),
    "a decay to nothing": (
        {"optimizer__schedule": "step", "optimizer__milestones": 5, "optimizer__decay": 0},
        "--optimizer.decay 0.0 must be greater than 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_INPUT[case]
    given = image_flags(source, **{"compare": "uniform", **given})
    assert message in refused("image_classification", source.parent / "run", capsys, **given)
    assert not (source.parent / "run").exists(), "nothing was written"


def test_tables_of_other_numbers_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = rows_of(source).train
    losses, kept = np.zeros(len(train), np.float32), source.parent / "table.safetensors"
    given = image_flags(source, compare="rho_loss", rho_loss__table=kept)
    LossTable(losses, train.content_hash, {"number": "entropy"}).save(kept)
    message = refused("image_classification", source.parent / "a", capsys, **given)
    assert "holds the entropy of each row, not irreducible losses" in message
    LossTable(losses, train.content_hash, {}).save(kept)
    message = refused("image_classification", source.parent / "b", capsys, **given, data__noise_fraction=0.1)
    assert "holds losses of data with the content hash" in message


def test_other_labels_in_the_same_file_are_other_data(source: Path) -> None:
    before = rows_of(source).hashes
    with np.load(source) as arrays:
        image, label = arrays["image"], arrays["label"]
    np.savez(source, image=image, label=np.roll(label, 1))
    after = rows_of(source).hashes
    assert not {*before.values()} & {*after.values()}


# -- faults in the data ----------------------------------------------------------------------------------------------


def label_of(rows: Any) -> np.ndarray:
    return rows.arrays["label"]


def fault(splits: Rows, name: str) -> np.ndarray:
    known = splits.known[name]
    assert known.fault
    return known.values == 1


def test_noise_replaces_labels_and_is_known(source: Path) -> None:
    clean = label_of(clean_sets(source).train)
    pair = rows_of(source, noise="pair", noise_fraction=0.5)
    wrong = fault(pair, "wrong_label")
    assert 0.4 < wrong.mean() < 0.6
    np.testing.assert_array_equal(label_of(pair.train), np.where(wrong, (clean + 1) % 4, clean))
    np.testing.assert_array_equal(pair.known["class"].values, clean)
    uniform = rows_of(source, noise_fraction=0.5)
    np.testing.assert_array_equal(label_of(uniform.train) != clean, fault(uniform, "wrong_label"))
    assert len(set(((label_of(uniform.train) - clean) % 4).tolist())) == 4, "any other class"
    assert fault(rows_of(source), "wrong_label").mean() == pytest.approx(0.4, abs=0.1)
    for splits in (pair, uniform):
        assert isinstance(splits.specific, type(splits.train))
        np.testing.assert_array_equal(label_of(splits.specific), label_of(clean_sets(source).specific))
        assert sorted(splits.train.arrays) == ["image", "label"], "learners read nothing else"  # pyright: ignore


def test_no_noise_is_no_fault(source: Path) -> None:
    splits = rows_of(source, noise="none")
    assert list(splits.known) == ["class"]
    np.testing.assert_array_equal(label_of(splits.train), label_of(clean_sets(source).train))
    assert "Noise" not in splits.about
    assert "Noise: uniform" in rows_of(source).about


def test_noise_in_the_held_out_rows(source: Path) -> None:
    clean = label_of(clean_sets(source).held_out)
    np.testing.assert_array_equal(label_of(rows_of(source).held_out), clean)
    assert (label_of(rows_of(source, noisy_held_out=True).held_out) != clean).mean() == pytest.approx(0.4, abs=0.2)


@pytest.mark.parametrize("kind", ["uniform", "pair"])
def test_noise_keeps_to_the_classes_of_the_training_set(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "gaps.npz", x=np.arange(120.0).reshape(60, 2), y=np.arange(60) % 2 * 4 + 1)
    splits = rows_of(tmp_path / "gaps.npz", noise=kind, noise_fraction=1.0)
    np.testing.assert_array_equal(label_of(splits.train), np.where(splits.known["class"].values == 1, 5, 1))


def test_recorded_labels_are_those_of_the_training_part(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
    np.savez(tmp_path / "human.npz", worse=(np.arange(30) + 1) % 3)
    noise = f"{tmp_path / 'human.npz'}:worse"
    splits = rows_of(tmp_path, tmp_path, noise=noise)
    np.testing.assert_array_equal(label_of(splits.train), (splits.known["class"].values + 1) % 3)
    with pytest.raises(UserError, match=r"from a validation part of its own: omit --data\.noisy-held-out"):
        rows_of(tmp_path, tmp_path, noise=noise, noisy_held_out=True)
    with pytest.raises(UserError, match="holds no array 'better'"):
        rows_of(tmp_path, tmp_path, noise=noise.replace("worse", "better"))


def test_recorded_labels_of_rows_that_are_drawn(source: Path) -> None:
    """The file has labels for all rows of the source; the training rows are some of them, in their order."""
    np.savez(source.parent / "labels.npz", worse=(np.arange(240) + 1) % 4)
    splits = rows_of(source, noise=f"{source.parent / 'labels.npz'}:worse", noisy_held_out=True)
    np.testing.assert_array_equal(label_of(splits.train), (label_of(clean_sets(source).train) + 1) % 4)
    np.testing.assert_array_equal(label_of(splits.held_out), (label_of(clean_sets(source).held_out) + 1) % 4)
    assert fault(splits, "wrong_label").all()


def test_the_most_confused_classes(source: Path) -> None:
    """A model is asked once, and asked anew about other data; half the labels of those classes are wrong."""
    given = {"noise": "confused", "confusion_steps": 4}
    first, again = rows_of(source, **given), rows_of(source, **given)
    np.testing.assert_array_equal(label_of(first.train), label_of(again.train))
    (kept,) = source.parent.glob("confusion/*/pairs.json")
    pairs = {int(name): value for name, value in json.loads(kept.read_text()).items()}
    clean, wrong = first.known["class"].values, fault(first, "wrong_label")
    assert set(clean[wrong].tolist()) <= set(pairs)
    np.testing.assert_array_equal(label_of(first.train)[wrong], [pairs[c] for c in clean[wrong]])
    assert wrong[np.isin(clean, list(pairs))].mean() == pytest.approx(0.5, abs=0.15)
    written = kept.stat().st_mtime_ns
    rows_of(source, **given, seed=1)
    assert len(list(source.parent.glob("confusion/*/pairs.json"))) == 2
    assert kept.stat().st_mtime_ns == written


def test_half_of_the_classes_count(source: Path) -> None:
    splits = rows_of(source, noise="none", relevant="half")
    counted = set(label_of(splits.specific).tolist())
    assert len(counted) == 2
    assert set(label_of(splits.test["test"]).tolist()) == set(label_of(splits.held_out).tolist()) == counted
    irrelevant = fault(splits, "irrelevant")
    np.testing.assert_array_equal(irrelevant, ~np.isin(label_of(splits.train), list(counted)))
    assert 0 < irrelevant.mean() < 1


def test_rare_classes_are_those_of_the_true_labels(source: Path) -> None:
    kept = np.bincount(label_of(rows_of(source, noise="none", imbalance=10).train))
    assert kept[0] > 5 * kept[3] > 0
    noisy = rows_of(source, noise_fraction=0.9, imbalance=10)
    np.testing.assert_array_equal(np.bincount(noisy.known["class"].values), kept)


def test_the_held_out_rows_of_a_validation_part(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.arange(60.0).reshape(30, 2), y=np.arange(30) % 3)
    assert rows_of(tmp_path, tmp_path, noise="none", held_out=0).held_out is None
    assert len(rows_of(tmp_path, tmp_path, noise="none").held_out or ()) == 6
    assert len(rows_of(tmp_path, tmp_path, noise="none", specific_rows=7).specific) == 7


def test_padding_of_crops(source: Path) -> None:
    """Cut out of reflections, every value is one of the image's own; zeros are its mean."""
    for mode, own in (("reflect", True), ("zero", False)):
        splits = rows_of(source, augment="crop", padding=2, padding_mode=mode)
        images = jnp.asarray(splits.train.arrays["image"][:32])  # pyright: ignore
        plain, cut = (np.asarray(f(images, jax.random.key(0))) for f in (splits.plain, splits.augmented))
        assert not np.array_equal(plain, cut)
        assert np.isin(cut, plain).all() == own


def test_only_the_generic_loss_of_training_is_augmented(source: Path) -> None:
    config = config_of(source, augment="crop", padding=2)
    splits = TASK.open(config, source.parent)
    model = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(model.init)(jax.random.key(0))
    batch = splits.train.rows(np.arange(16))
    assert model.scoring is not None
    losses = {name: np.asarray(loss(params, state, batch, jax.random.key(1))[0]) for name, loss in
              (("train", model.loss), ("specific", model.specific_loss), ("evaluated", model.evaluation),
               ("scored", model.scoring("batch")))}  # fmt: skip
    for name in ("specific", "scored"):
        np.testing.assert_allclose(losses[name], losses["evaluated"], rtol=1e-6)
    assert not np.allclose(losses["train"], losses["evaluated"])


# -- networks --------------------------------------------------------------------------------------------------------


def logits_with(splits: Rows, model: ModelConfig, batch: Any) -> np.ndarray:
    """The logits of a weighting network whose last layer has moved away from 0, where it begins."""
    network = TASK.weighting(config_of(DIGITS, model), splits)
    assert callable(network.logits)
    params = network.init(jax.random.key(0))
    np.testing.assert_array_equal(network.logits(params, batch), 0)
    params["head"] = jax.tree.map(lambda x: 20 * jax.random.normal(jax.random.key(1), x.shape, x.dtype), params["head"])
    return np.asarray(network.logits(params, batch))


def test_the_weighting_network_is_bounded(source: Path) -> None:
    """Logits far beyond the bound keep their order and their sign within it; without a bound they are as they are."""
    splits = rows_of(source)
    batch = splits.train.rows(np.arange(32))
    raw = logits_with(splits, ModelConfig(width=8, weighting_bound=0.0), batch)
    assert np.abs(raw).max() > 4
    bounded = logits_with(splits, ModelConfig(width=8, weighting_bound=3.0), batch)
    np.testing.assert_allclose(bounded, 3 * np.tanh(raw / 3), rtol=1e-5)


@pytest.mark.parametrize("labels", [True, False])
def test_the_weighting_network_sees_labels_if_it_is_to(labels: bool, source: Path) -> None:
    splits, model = rows_of(source), ModelConfig(width=8, weighting_labels=labels)
    batch = splits.train.rows(np.arange(32))
    other = {**batch, "label": (batch["label"] + 1) % 4}
    same = logits_with(splits, model, batch) == logits_with(splits, model, other)
    assert same.all() if not labels else not same.all()


def test_batch_norm_normalises_by_the_rows_scored_together(source: Path) -> None:
    """ "batch": a row's loss depends on the others; "running": it does not, and is that of the evaluation."""
    config = config_of(source, ModelConfig("wrn10-1"))
    splits = TASK.open(config, source.parent)
    model = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(model.init)(jax.random.key(0))
    assert "batch_stats" in state
    assert model.scoring is not None
    many, few = (splits.train.rows(np.arange(n)) for n in (12, 4))
    losses = {}
    for statistics in ("batch", "running"):
        loss = jax.jit(model.scoring(statistics))
        losses[statistics] = [np.asarray(loss(params, state, rows, jax.random.key(0))[0])[:4] for rows in (many, few)]
    assert not np.allclose(*losses["batch"], rtol=1e-3)
    np.testing.assert_allclose(*losses["running"], rtol=1e-4)
    evaluated = jax.jit(model.evaluation)(params, state, few, jax.random.key(0))[0]
    np.testing.assert_allclose(losses["running"][1], evaluated, rtol=1e-5)


def test_the_evaluation_is_a_mean_over_rows(source: Path) -> None:
    config = config_of(source)
    splits = TASK.open(config, source.parent)
    model = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(model.init)(jax.random.key(0))
    batch = splits.train.rows(np.arange(len(splits.train)))
    images = splits.plain(jnp.asarray(batch["image"]), jax.random.key(0))
    x, layers = np.asarray(images, np.float64).reshape(len(images), -1), jax.tree.map(np.asarray, params)
    for i in range(3):
        x = np.maximum(x @ layers[f"hidden_{i}"]["kernel"] + layers[f"hidden_{i}"]["bias"], 0)
    head = layers["head"]["classifier"]
    logits = x @ head["kernel"] + head["bias"]
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(x)), batch["label"]]
    found = TASK.evaluate(config, splits, model)(params, state, splits.train, None)
    assert found["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == batch["label"]).mean())


@pytest.mark.parametrize("network", ["mlp", "wrn10-1"])
def test_only_scoring_is_in_half_precision(source: Path, network: str) -> None:
    config = config_of(source, ModelConfig(network, width=8))
    splits = TASK.open(config, source.parent)
    for dtype in ("bfloat16", None):
        model, scorer = (TASK.model(config, splits, ModelOptions(dtype=d)) for d in (None, dtype))
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        batch = splits.train.rows(np.arange(4))
        assert scorer.scoring is not None
        losses = {"score": scorer.scoring("batch"), "train": model.loss, "evaluate": model.evaluation}
        text = {n: str(jax.make_jaxpr(loss)(params, state, batch, jax.random.key(0))) for n, loss in losses.items()}
        assert ("bf16" in text["score"]) == (dtype is not None)
        assert "bf16" not in text["train"] + text["evaluate"]


@pytest.mark.slow
def test_a_proxy_scores_and_the_classifier_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Irreducible losses are those of the classifier's network, and what is evaluated is the classifier."""
    from bilevel.study import run

    kept: list[Any] = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda *a, **k: kept.append(train(*a, **k)) or kept[-1])
    given = digit_flags(compare="rho_loss", rho_loss__network="mlp-small", rho_loss__held_out_steps=4)
    (row,) = compare("image_classification", tmp_path, **given)
    assert row["scored_by"] == (
        "scored by mlp-small, which is trained along on the rows picked, by a forward pass in the type of the model, "
        "no BatchNorm"
    )
    params = kept[-1].state.params
    units = {name: params[name]["hidden_0"]["bias"].shape[0] for name in ("target", "proxy")}
    assert units == {"target": 8, "proxy": 1}
    config = dataclasses.replace(config_of(DIGITS, limit=200))
    splits = TASK.open(config, tmp_path)
    model = TASK.model(config, splits, ModelOptions())
    measured = TASK.evaluate(config, splits, model)(params["target"], {}, splits.test["test"], None)
    assert row["test_loss"] == pytest.approx(measured["loss"])
    (table,) = tmp_path.glob("prepared/irreducible-*/table.safetensors")
    assert LossTable.load(table, content_hash=splits.train.content_hash, settings=None).settings["network"] is None


# -- pictures --------------------------------------------------------------------------------------------------------


def test_wrong_labels_are_red(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(source)
    splits = TASK.open(config, source.parent)
    ids = np.arange(20)
    (shown,) = TASK.show(config, splits, ids)
    assert isinstance(shown, Picture)
    wrong = fault(splits, "wrong_label")[ids].sum()
    assert 0 < wrong < 20
    assert shown.svg.count("#ff0000") == wrong
    clean = config_of(source, noise="none")
    (all_right,) = TASK.show(clean, TASK.open(clean, source.parent), ids)
    assert isinstance(all_right, Picture)
    assert "#ff0000" not in all_right.svg


@pytest.mark.parametrize("channels", [2, 3, 4, 5])
def test_images_of_any_channels_are_drawn(channels: int) -> None:
    image = np.arange(4 * 4 * channels).reshape(4, 4, channels).astype(np.uint8)
    shown = mosaic._colours(image)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    assert shown.shape == (4, 4, 3)
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    np.testing.assert_array_equal(shown, image[..., :3] if channels in (3, 4) else grey)


def test_rows_are_ranked_by_logits_of_batches_drawn_at_random(tmp_path: Path) -> None:
    """A network that centres its batch, on rows sorted by class: classes differ by as much as their brightness does."""
    label = np.repeat(np.arange(4), 65)
    image = (50 * label[:, None, None, None] + np.random.default_rng(0).integers(0, 9, (260, 5, 5, 1))).astype(np.uint8)
    np.savez(tmp_path / "sorted.npz", image=image, label=label)
    splits = rows_of(tmp_path / "sorted.npz", noise="none", specific_rows=8, held_out=0, test=8)

    def logits(weights: Any, batch: Any) -> Any:
        bright = batch["image"].astype(float).mean((1, 2, 3)) / 50
        return bright - bright.mean()

    class_of, count = label_of(splits.train), len(splits.train)
    assert count % 16, "the last batch is filled"
    context: Any = SimpleNamespace(
        splits=splits,
        task=TASK,
        directory=tmp_path,
        mesh=None,
        weighting=Weighting(lambda key: {}, logits),
        study=SimpleNamespace(weigh="rows"),
    )
    ids, found = logits_of_rows(logits, {}, splits.train, batch_size=16, most=1000)
    assert sorted(ids) == list(range(count))
    means = [found[class_of[ids] == c].mean() for c in range(4)]
    np.testing.assert_allclose(means, np.arange(4) - class_of.mean(), atol=0.15)
    wrong = Known((class_of == 3).astype(np.int32), ("no", "yes"), fault=True)
    context.splits = dataclasses.replace(splits, known={"bright": wrong})
    share = weights.save_weights(context, 16, SimpleNamespace(weight_params={}))["weight_on/bright"]
    assert share == pytest.approx(np.exp(found)[class_of[ids] == 3].sum() / np.exp(found).sum(), rel=1e-6)
