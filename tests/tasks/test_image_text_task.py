"""Images and captions: data, losses and evaluation of the task, and each kind of method, as a user calls it."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import compare, equal_after_a_kill, flags, metrics_of, refused, results
from study_calls import two_processes
from tiny_pictures import DOMAINS, SIDE, picture_flags, shrink_towers, write_pictures
from traced import fitting, setting_of

from bilevel import cli
from bilevel.data import Loader, MixedData, PastLoader, RowView, each_part
from bilevel.devices import sharding
from bilevel.study import ModelOptions
from bilevel.study.feeding import loaders
from bilevel.study.run import Run
from bilevel.tasks.image_text import TASK, CaptionSplits, DataConfig, ImageTextConfig, ModelConfig
from bilevel.training.two_stage import TwoStageData

pytest.importorskip("sklearn")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink_towers(monkeypatch)
    return write_pictures(tmp_path)


def config_of(text: Path, **data: Any) -> ImageTextConfig:
    given = {"generic": str(text / "generic.npz"), "specific": str(text / "specific"), "template": "striped {}", **data}
    sizes = {"size": SIDE, "small_size": 4, "text_dimensions": 8, "past": 24, "cache_dir": text / "cache"}
    model = ModelConfig(width=8, text_hidden=(8,), weighting_features=(4,))
    return ImageTextConfig(DataConfig(**{**sizes, **given}), model)


def splits_of(text: Path, **data: Any) -> CaptionSplits:
    return TASK.open(config_of(text, **data), text)


def given_of(text: Path, **data: Any) -> dict[str, Any]:
    config = config_of(text, **data)
    return {part: vars(getattr(config, part)) for part in ("data", "model")}


# -- as a user calls it ----------------------------------------------------------------------------------------------


def test_a_comparison_on_captioned_images(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = picture_flags(text, data__generic_labels=text / "labels.tsv", finetune__steps=4)
    rows = compare("image_text", text / "run", **given, compare="uniform,soba")
    for row in rows:
        for name in ("accuracy", "loss", "class_accuracy"):
            for phase in ("valid", "test", "finetuned_test"):
                assert math.isfinite(row[f"{phase}_{name}"]), name
            assert math.isfinite(row[f"valid_{name}/generic"]), name
        assert math.isfinite(row["share/fault"])
    last = metrics_of(text / "run" / "soba-seed0")[-1]
    assert sum(last[f"share/{name}"] for name in DOMAINS) == pytest.approx(1)
    report = (text / "run" / "report.html").read_text()
    for part in ("rows with the highest weights", "3 classes", "lsa, 8 dimensions"):
        assert part in report, part
    assert "| test accuracy |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_stages_train_like_one(text: Path) -> None:
    given = picture_flags(text, compare="soba", data__augment="none")
    (whole,) = compare("image_text", text / "whole", **given, resident="never")
    (staged,) = compare("image_text", text / "staged", **given, two_stage=True)
    assert staged["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)
    kept = [metrics_of(text / name / "soba-seed0")[-1]["generic_loss"] for name in ("whole", "staged")]
    assert kept[0] == pytest.approx(kept[1], rel=1e-4)


def test_only_what_weights_read_is_loaded_in_a_first_stage(text: Path) -> None:
    setting = setting_of(TASK, text / "run", given_of(text), {"soba": {"specific_candidates": 2}})
    setting = setting.of(setting.config.with_study(two_stage=True))
    source = Run(setting.context("soba", 0)).source()
    assert isinstance(source, TwoStageData)
    small, _, rows_at = source.item(3, 1, 1).arguments
    assert {*small} == {"small", "caption", "label", "id"}
    assert len(small["small"]) == 16
    rows = rows_at(np.asarray([0, 15]))
    assert rows["image"].shape == (2, SIDE, SIDE, 3)
    np.testing.assert_array_equal(rows["small"], small["small"][jnp.asarray([0, 15])])
    assert rows["past"].arrays["text"].shape == (24, 8)
    # Methods that score whole rows, or pick none, load them as always.
    for method in ("rho_loss", "uniform"):
        assert not isinstance(Run(setting.context(method, 0)).source(), TwoStageData)


@pytest.mark.slow
def test_a_killed_run_ends_like_one_left_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = picture_flags(text, compare="soba", data__generic_labels=text / "labels.tsv")
    killed, whole = equal_after_a_kill("image_text", text, monkeypatch, **given)
    assert metrics_of(killed / "soba-seed0") == metrics_of(whole / "soba-seed0")


def test_methods_of_each_kind_can_be_trained_on_captions(text: Path) -> None:
    given = given_of(text, generic_labels=str(text / "labels.tsv"), known_faults=True)
    # All methods run on the linear task.
    setting = setting_of(TASK, text / "run", given, {"contrastive": {"fraction": 0.1, "rows": 100}})
    assert {"soba", "dds", "mentornet", "rho_loss", "classifier", "contrastive", "mixing"} <= {*fitting(setting)}
    for method in ("uniform", "mixing", "mentornet", "rho_loss", "soba", "dds", "meta_weight_net"):
        trace_with_past(setting, method)


def trace_with_past(setting: Any, method: str) -> None:
    """As `trace`, whose batches have nothing but rows."""
    context = setting.context(method, 0)
    plan = Run(context).plan
    generic, specific = loaders(context, plan)
    assert isinstance(generic, PastLoader)
    state = jax.eval_shape(plan.init, *jax.random.split(jax.random.key(0), 3))
    after, metrics = jax.eval_shape(plan.step.at(0), state, generic.batch(1), specific.batch(1))  # pyright: ignore[reportArgumentType]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["generic_loss"].shape == ()


@pytest.mark.slow
def test_learned_weights_find_the_stripes(text: Path) -> None:
    """With an α-gradient of 32 rows that are drawn uniformly; with 8 that the filter picks, soba came to prefer noise."""
    given = picture_flags(text, data__generic_labels=text / "labels.tsv", compare="soba", steps=300, log_every=20)
    given |= {"batch_size": 8, "big_batch_size": 64, "evaluate_every": 100, "optimizer__learning_rate": 0.01}
    given |= {"data__small_size": SIDE, "model__weighting_features": 8, "soba__weight_learning_rate": 0.01}
    given |= {"soba__estimator": "softmax", "soba__alpha_batch": "uniform", "soba__alpha_batch_size": 32}
    compare("image_text", text / "run", **given)
    tail = metrics_of(text / "run" / "soba-seed0")[-5:]
    assert np.mean([row["share/stripes"] for row in tail]) > 0.7, "half of the images have stripes"


def test_the_papers_experiment() -> None:
    """Grangier et al., tables 1 and 15."""
    found = cli.parse(["compare", "image_text", "--preset", "atd"]).settings
    study, model, data = found.study, found.task.model, found.task.data
    assert (study.batch_size, study.big_batch_size, study.steps) == (256, 2048, 500_000)
    assert (study.optimizer.name, study.optimizer.learning_rate, study.two_stage) == ("sgd", 0.05, True)
    assert (model.network, model.text_hidden, model.weighting_features) == ("resnet50", (768, 768), (32, 32, 32, 64))
    assert (data.size, data.small_size, data.decode) == (224, 32, "each_time")
    assert found.methods["soba"].chosen_rate == found.methods["classifier"].weight_learning_rate == 1e-4


# -- data ------------------------------------------------------------------------------------------------------------


def test_splits_and_what_is_known(text: Path) -> None:
    splits = splits_of(text, generic_labels=text / "labels.tsv")
    packed = splits.rows.packed
    assert [*splits.valid] == ["specific", "generic"], "the specific set decides"
    assert len(splits.train) + len(splits.valid["generic"]) == 240
    assert splits.class_texts is not None
    assert splits.class_texts.shape == (3, 8)
    assert [*splits.known] == ["domain", "fault"]
    wrong, domain = splits.known["fault"].values, splits.known["domain"]
    for i in range(len(packed)):
        assert (domain.names[domain.values[i]] == "stripes") == packed.text(i).startswith("striped")
    share = wrong[domain.values == domain.names.index("stripes")].mean()
    assert share == pytest.approx(0.25, abs=0.05)
    (picture,) = TASK.show(config_of(text), splits, np.arange(5))
    assert packed.text(0) in picture[1]


def test_parts_of_views_and_of_mixed_rows(text: Path) -> None:
    splits = splits_of(text)
    assert splits.past is not None
    mixed = MixedData(RowView(splits.train, np.asarray([5, 3, 9])), splits.specific)
    small = each_part(mixed, lambda rows: rows.small)
    captions = each_part(mixed, splits.past.rows)
    places = np.asarray([2, 0, 4])
    expected = mixed.rows(places)
    for part in (small, captions):
        found = part.rows(places)
        assert "image" not in found
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_images_without_classes_are_compared_with_specific_captions(text: Path) -> None:
    for part in ("train", "valid", "test"):
        file = text / "specific" / f"{part}.npz"
        arrays = dict(np.load(file))
        captions = [f"striped {label} {i % 7}" for i, label in enumerate(arrays.pop("labels"))]
        np.savez(file, **arrays, captions=np.asarray(captions))
    splits = splits_of(text, template=None)
    assert splits.class_texts is None
    own = np.unique(splits.specific.packed.caption)  # pyright: ignore[reportAttributeAccessIssue]
    assert {*own[:24].tolist()} & {*splits.compared["caption"].tolist()}
    model = TASK.model(config_of(text, template=None), splits, ModelOptions())
    params, state = model.init(jax.random.key(0))
    losses, _ = model.specific_loss(params, state, splits.specific.rows(np.arange(4)), jax.random.key(1))
    assert np.isfinite(losses).all()


# -- model and measures ----------------------------------------------------------------------------------------------


def test_the_measures_are_those_of_zero_shot_classification(text: Path) -> None:
    config, splits = config_of(text), splits_of(text)
    model = TASK.model(config, splits, ModelOptions())
    params, state = model.init(jax.random.key(3))
    rows = splits.test["test"]
    keep = RowView(rows, np.asarray([0, 1, 2, 3, 6, 9]))  # classes of 4, 1 and 1 rows
    found = TASK.evaluate(config, splits, model)(params, state, keep, None)
    batch = keep.rows(np.arange(len(keep)))
    losses, aux = model.evaluation(params, state, batch, jax.random.key(0))
    right = np.asarray(aux.metrics["correct"])
    of_class = [right[batch["label"] == c].mean() for c in range(3)]
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["class_accuracy"] == pytest.approx(np.mean(of_class))
    assert found["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_losses_that_are_compared_have_the_same_captions(text: Path) -> None:
    """Contrastive selection and irreducible losses are differences of losses, whatever batch a row was loaded in."""
    config, splits = config_of(text), splits_of(text)
    model = TASK.model(config, splits, ModelOptions())
    params, state = model.init(jax.random.key(0))
    loader = PastLoader(loader_of(splits), splits.rows.captions, 24)
    with_its_own = {step: loader.batch(step) for step in (1, 2)}
    row = jax.tree.map(lambda x: x, splits.train.rows(np.arange(4)))
    key = jax.random.key(1)
    alone = model.evaluation(params, state, row, key)[0]
    for batch in with_its_own.values():
        brought = {**row, "past": batch["past"]}
        np.testing.assert_array_equal(model.evaluation(params, state, brought, key)[0], alone)
        assert not np.allclose(model.loss(params, state, brought, key)[0], model.loss(params, state, row, key)[0])


def loader_of(splits: CaptionSplits) -> Any:
    return Loader(splits.train, 16, seed=0)


def test_eight_devices_learn_like_one(text: Path) -> None:
    """The captions before a batch are a function of (seed, step), whatever the devices."""
    splits = splits_of(text)
    model = TASK.model(config_of(text), splits, ModelOptions())
    params, state = model.init(jax.random.key(0))
    batch = PastLoader(loader_of(splits), splits.rows.captions, 24).batch(2)

    def gradient(batch: Any) -> Any:
        return jax.grad(lambda p: jnp.mean(model.loss(p, state, batch, jax.random.key(1))[0]))(params)

    one = jax.jit(gradient)(batch)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), (sharding.DATA_AXIS,))
    many = jax.jit(gradient)(sharding.batch_placer(mesh)(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), many, one)


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"data__generic": "nowhere.npz"}, "--data.generic: The file nowhere.npz does not exist"),
    "too few words": ({"data__text_dimensions": 500}, "--data.text-dimensions"),
    "vectors that are not there": ({"data__embedding": "nowhere.npz"}, "--data.embedding nowhere.npz"),
    "faults without labels": ({"data__known_faults": True}, "--data.known-faults needs"),
    "small images that are not": ({"data__small_size": 9}, "--data.small-size 9"),
    "no such tower": ({"model__network": "vit"}, 'There is no image tower "vit"'),
    "a template without a place": ({"data__template": "a thing"}, "--data.template"),
    "resident and loaded": ({"two_stage": True, "resident": "always"}, "--two-stage"),
    "a method for labels": ({"compare": "svp"}, "--compare names svp, which needs rows with a label"),
    "mentornet without faults": ({"compare": "mentornet"}, "known to be right or wrong"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_INPUT[case]
    flags = picture_flags(text, **{"compare": "soba", **given})
    assert message in refused("image_text", text / "run", capsys, **flags)


def test_rows_that_are_read_in_full_have_no_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("image_classification", tmp_path / "run", capsys, compare="soba", two_stage=True)
    assert "--two-stage" in message


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Each loads its own rows and all past captions; the tower is the real one, as another process makes it."""
    text = write_pictures(tmp_path)
    given = picture_flags(text, compare="soba", batch_size=8, big_batch_size=32, finetune__steps=4, resident="never")
    two_processes("compare", "image_text", *flags(tmp_path / "two", **given))
    (two,), (one,) = results(tmp_path / "two"), compare("image_text", tmp_path / "one", **given)
    for name in ("test_loss", "valid_loss", "finetuned_test_loss", "test_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
