"""The analyses, as a user calls them, at tiny sizes."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import linear_task
import numpy as np
import pytest

from bilevel.cli import main
from bilevel.data import permute
from bilevel.files import load_tree, save_tree
from bilevel.study.config import Config
from bilevel.study.context import Setting
from bilevel.study.feeding import loaders
from bilevel.study.methods.learning import LEARNING
from bilevel.study.methods.picking import Picking
from bilevel.study.registry import METHODS
from bilevel.study.resolve import default_config
from bilevel.study.run import Run, run
from bilevel.study.weights import parts_of
from bilevel.tools.analyses import ANALYSES
from bilevel.tools.analyses.acceleration import Acceleration
from bilevel.tools.analyses.base import Planned, metrics_of
from bilevel.tools.analyses.curriculum import Curriculum
from bilevel.tools.analyses.filters import Filters, distinct
from bilevel.tools.analyses.multi_task import MultiTask
from bilevel.tools.analyses.transfer import Transfer
from bilevel.training import Snapshots, TrainingDiverged, train
from bilevel.training.run_dir import read_settings
from bilevel.types import UserError

Call = Callable[..., None]
STEPS = 8
TASK: Any = linear_task.TASK
FAST = {"soba__weight_learning_rate": 3.0}
"""So that weights decide what is picked after few steps."""
SETS = ("--specific-sets", "first", "second")


def results(folder: Path, name: str, printed: str = "") -> list[dict[str, Any]]:
    assert "<svg" in (folder / f"{name}.svg").read_text()
    if printed:
        assert (folder / f"{name}.md").read_text().strip() in printed
    return json.loads((folder / f"{name}.json").read_text())


def setting_of(analysis: Any, folder: Path, **given: Any) -> Setting:
    """The setting of an analysis on the linear task."""
    config: Config = analysis.adapted(default_config(TASK)).with_study(run_dir=folder, **given)
    soba = dataclasses.replace(config.methods["soba"], weight_learning_rate=3.0, probe_every=0)
    (setting,) = analysis.opened(config.with_method("soba", soba), TASK)
    return setting


def test_curriculum(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("analyse", "curriculum", snapshots=4, **FAST)
    rows = results(tmp_path / "run", "curriculum", printed := capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["soba", "final", "shuffled", "replayed"]
    assert all(math.isfinite(row[name]) for row in rows for name in ("valid_loss", "test_loss", "valid_loss/generic"))
    assert printed.startswith("| method | seeds | test loss | valid loss | generic valid loss | steps | seconds |")
    folder = tmp_path / "run" / "soba-seed0"
    files = {path.name: load_tree(path)[0]["of"].tolist() for path in (folder / "snapshots").iterdir()}
    assert sorted(files) == [f"{step:08d}.safetensors" for step in (0, 2, 4, 6, 8)]
    assert files["00000008.safetensors"] != files["00000000.safetensors"]
    for run_of in (folder, tmp_path / "run" / "final" / "frozen-seed0"):
        assert load_tree(run_of / "weights.safetensors")[0]["of"].tolist() == files["00000008.safetensors"]
    with pytest.raises(SystemExit):
        call("analyse", "curriculum", snapshots=8, **FAST)
    assert "snapshot_every was 2, now 1" in capsys.readouterr().err
    (tmp_path / "run" / "replayed" / "frozen-seed0" / "result.json").unlink()
    (folder / "snapshots" / "00000004.safetensors").unlink()
    with pytest.raises(SystemExit):
        call("analyse", "curriculum", snapshots=4, **FAST)
    assert "soba-seed0 lacks the snapshot 00000004.safetensors of its weights: give" in capsys.readouterr().err


def test_a_trajectory_with_all_steps_is_replayed_exactly(tmp_path: Path) -> None:
    analysis = Curriculum(snapshots=STEPS)
    losses = {}
    for planned in analysis.runs(setting_of(analysis, tmp_path), 0):
        context = planned.context
        recorder = Snapshots(context.directory / "used", 1)
        if context.method == "frozen":
            variant = context.variant._replace(on_state=recorder.save, state_every=1)
            context = dataclasses.replace(context, variant=variant)
        losses[planned.label] = run(context)["test_loss"]
    kept = Snapshots(tmp_path / "soba-seed0" / "snapshots", 1)
    files = {step: kept.path(step).read_bytes() for step in range(STEPS + 1)}
    assert len(set(files.values())) > STEPS // 2

    def used(label: str) -> list[bytes]:
        own = Snapshots(tmp_path / label / "frozen-seed0" / "used", 1)
        return [own.path(step).read_bytes() for step in range(1, STEPS + 1)]

    assert used("replayed") == [files[step] for step in range(STEPS)]
    assert used("final") == [files[STEPS]] * STEPS
    assert used("shuffled") == [files[step] for step in permute(np.arange(STEPS), STEPS, 0, 6_000_003)]
    assert sorted(used("shuffled")) == sorted(used("replayed")) != used("shuffled")
    # the same batches were picked by the same weights; only the rounding of another program differs
    assert losses["replayed"] == pytest.approx(losses["soba"], rel=1e-4)
    assert losses["shuffled"] != pytest.approx(losses["soba"], rel=1e-4)


def test_a_stopped_learner_continues_with_the_same_snapshots(tmp_path: Path) -> None:
    analysis = Curriculum(snapshots=4)

    def learn(folder: Path, steps: int) -> Path:
        setting = setting_of(analysis, folder, checkpoint_every=3)
        context = next(analysis.runs(setting, 0)).context
        run(context.of(context.config.with_study(steps=steps, schedule_steps=STEPS)))
        return context.directory

    first, second = learn(tmp_path / "first", STEPS), learn(tmp_path / "second", 3)
    for path in (second / "snapshots").glob("*"):
        if path.name > "00000003":
            path.unlink()
    for name in ("config.yaml", "result.json"):
        (second / name).unlink()
    learn(tmp_path / "second", STEPS)
    found, wanted = ({p.name: p.read_bytes() for p in (f / "snapshots").iterdir()} for f in (second, first))
    assert found == wanted


def test_filters_and_what_is_finished_is_not_done_again(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def again() -> list[dict[str, Any]]:
        call("analyse", "filters", more=("--filters", "importance", "uniform"), **FAST)
        return results(tmp_path / "run", "filters", capsys.readouterr().out)

    before = again()
    finished = tmp_path / "run" / "importance" / "soba-seed0" / "metrics.jsonl"
    written = finished.stat().st_mtime_ns
    (tmp_path / "run" / "uniform" / "uniform-seed0" / "result.json").unlink()  # as if killed after the last checkpoint
    importance, uniform = again()
    assert finished.stat().st_mtime_ns == written
    assert (importance["method"], uniform["method"]) == ("importance", "uniform")
    assert importance == before[0]
    assert uniform["test_loss"] == before[1]["test_loss"]
    assert uniform["distinct_rows"] == 100
    assert "effective_sample_size" not in uniform
    assert 25 <= importance["distinct_rows"] < 100


def test_a_run_for_each_filter(tmp_path: Path) -> None:
    planned = list((analysis := Filters()).runs(setting_of(analysis, tmp_path), 0))
    assert [p.label for p in planned] == ["gumbel_top_k", "importance", "top_k", "uniform"]
    learned = [p.context.config.methods["soba"] for p in planned[:3]]
    assert [(s.filter, s.estimator) for s in learned] == [(p.label, "softmax") for p in planned[:3]]
    assert [p.context.method for p in planned] == ["soba", "soba", "soba", "uniform"]
    assert len({p.context.directory for p in planned}) == 4


def test_the_methods_that_learn_are_all_there() -> None:
    assert {"soba", "warm_soba", "dds", "anograd", "penalty", "implicit_cg", "implicit_neumann"} <= {*LEARNING}
    assert not {"uniform", "classifier", "frozen", "meta_weight_net", "learning_to_reweight"} & {*LEARNING}
    for name in LEARNING:
        Filters(learner=name).check(Filters.adapted(default_config(TASK)))


def test_tasks_of_dense_weights_pick_rows_here() -> None:
    config = default_config(TASK)
    dense = dataclasses.replace(config.methods["dds"], mode="dense", weight_learning_rate=3e-4)
    config = config.with_method("dds", dense)
    found = Curriculum.adapted(config).methods["dds"]
    assert (found.mode, found.weight_learning_rate) == ("sparse", None)
    assert Acceleration.adapted(config).methods["dds"] == dense
    with pytest.raises(UserError, match=r"--dds.mode dense is not for this analysis"):
        Curriculum(learner="dds").check(config)


def test_frozen_weights_are_filtered_as_they_were_learned(tmp_path: Path) -> None:
    analysis = Curriculum()
    setting = setting_of(analysis, tmp_path)
    own = dataclasses.replace(setting.config.methods["soba"], filter="top_k", temperature=0.5)
    frozen = analysis.frozen(setting.of(setting.config.with_method("soba", own)), tmp_path).config.methods["frozen"]
    assert {f.name: getattr(frozen, f.name) for f in dataclasses.fields(Picking)} == {
        f.name: getattr(own, f.name) for f in dataclasses.fields(Picking)
    }
    assert (frozen.filter, frozen.weights) == ("top_k", tmp_path)


def test_distinct_rows() -> None:
    ids = np.array([3, 1, 2, 0, 5, 5, 5, 5, 2, 7, 2, 7], np.int32)
    assert distinct(4, ids, 2) == {"distinct_rows": pytest.approx(100 * (1 + 1 / 4 + 2 / 4) / 3)}
    assert distinct(6, ids, 2) == {"distinct_rows": pytest.approx(100 * (5 / 6 + 3 / 6) / 2)}


@pytest.mark.slow
def test_transfer_over_seeds_and_moved(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("analyse", "transfer", large="affine", seeds=2, **FAST)
    found = results(tmp_path / "run", "transfer", printed := capsys.readouterr().out)
    assert " ± " in printed
    assert [row["seed"] for row in found] == [seed for seed in range(2) for _ in range(4)]
    rows = {row["method"]: row for row in found}
    assert list(rows) == ["linear: soba", "affine: uniform", "affine: soba", "affine: weights from linear"]
    folders = ["linear/soba-seed0", "affine/uniform-seed0", "affine/soba-seed0", "affine/frozen-seed0"]
    networks = [read_settings(tmp_path / "run" / folder)["model"]["network"] for folder in folders]
    assert networks == ["linear", "affine", "affine", "affine"]
    learned, own, reused = (
        load_tree(tmp_path / "run" / folders[i] / "weights.safetensors")[0]["of"].tolist() for i in (0, 2, 3)
    )
    assert learned == reused != own
    assert rows["affine: uniform"]["seconds_to_uniform"] > 0
    assert "seconds_to_uniform" not in rows["linear: soba"]
    (tmp_path / "run").rename(tmp_path / "moved")
    call("analyse", "transfer", large="affine", seeds=2, run_dir="moved", **FAST)
    frozen = read_settings(tmp_path / "moved" / "affine" / "frozen-seed0")["frozen"]
    assert frozen["weights"] == str(tmp_path / "moved" / "linear" / "soba-seed0")
    assert results(tmp_path / "moved", "transfer") == found


def test_weights_are_known_wherever_they_lie(tmp_path: Path) -> None:
    def learned(name: str, value: float) -> Path:
        (tmp_path / name).mkdir()
        save_tree(tmp_path / name / "weights.safetensors", {"a": np.full(3, value, np.float32)})
        return tmp_path / name / "weights.safetensors"

    one, copy, other = learned("one", 1.0), learned("copy", 1.0), learned("other", 2.0)
    assert list(parts_of(one)) == list(parts_of(copy)) != list(parts_of(other))
    with pytest.raises(UserError, match="does not exist"):
        list(parts_of(tmp_path / "gone" / "weights.safetensors"))


def test_what_precedes_training_counts(tmp_path: Path) -> None:
    directory = tmp_path / "warm_soba-seed0"
    directory.mkdir()
    lines = [json.dumps({"step": step, "seconds": float(step)}) for step in (2, 4)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for summary, seconds in (
        ({"preparation_seconds": 10.0}, [12, 14]),
        ({"preparation_seconds": 10.0, "preparation_step": 2}, [2, 14]),
        ({}, [2, 4]),
    ):
        assert [row["seconds"] for row in metrics_of(directory, summary)] == seconds


def test_seconds_to_the_baseline(tmp_path: Path) -> None:
    analysis = Transfer(large="affine")
    planned = list(analysis.runs(setting_of(analysis, tmp_path), 0))

    def ended(run: Planned, losses: list[float]) -> Planned:
        rows = [{"step": i, "seconds": 10.0 * i, "valid_loss": x} for i, x in enumerate(losses)]
        return run._replace(metrics=rows)

    runs = [ended(p, x) for p, x in zip(planned, ([1.0], [3.0, 2.5], [2.5, 1.0], [9.0, 9.0]), strict=True)]
    measure = TASK.measures[0]
    found = [analysis.added(run, runs, measure) for run in runs]
    assert [row.get("seconds_to_uniform", "none") for row in found] == ["none", 10, 0, None]
    found = [analysis.added(run, runs, measure._replace(lower_is_better=False)) for run in runs]
    assert [row.get("seconds_to_uniform") for row in found] == [None, 0, 0, 0]


def test_acceleration(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"rows": 16, "pairs": 2, "batch_rows": 8}
    call("analyse", "acceleration", more=SETS, **sizes)
    rows = results(tmp_path / "run", "acceleration", printed := capsys.readouterr().out)
    assert [row["method"] for row in rows] == [f"{s}: {m}" for s in ("first", "second") for m in ("uniform", "soba")]
    for uniform, soba in zip(rows[::2], rows[1::2], strict=True):
        assert soba["gain"] == uniform["test_loss"] - soba["test_loss"]
        assert f"| {100 * uniform['sar']:.1f} | {100 * uniform['sar_error']:.1f} |" in printed
    call("analyse", "acceleration", more=SETS, **sizes)  # measured again, on the same parameters
    assert results(tmp_path / "run", "acceleration") == rows
    call("diagnose", checkpoint=tmp_path / "run" / "second" / "uniform-seed0", run_dir="diagnosed", **sizes)
    (found,) = json.loads((tmp_path / "diagnosed" / "diagnose.json").read_text())["measurements"]
    assert (found["sar"], found["gar_error"]) == pytest.approx((rows[2]["sar"], rows[2]["gar_error"]))


def test_gains_count_upwards(tmp_path: Path) -> None:
    analysis = Acceleration(learner="dds")
    planned = analysis.runs(setting_of(analysis, tmp_path), 0)
    runs = [p._replace(summary={"test_loss": value}) for p, value in zip(planned, (2.0, 1.5), strict=True)]
    measure = TASK.measures[0]
    assert analysis.added(runs[1], runs, measure) == {"gain": 0.5}
    assert analysis.added(runs[1], runs, measure._replace(lower_is_better=False)) == {"gain": -0.5}


def test_multi_task(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("analyse", "multi_task", more=SETS, finetune__steps=60, classifier__steps=20)
    rows = results(tmp_path / "run", "multi_task", printed := capsys.readouterr().out)
    head = printed.splitlines()[0]
    for title in ("test loss", "first test loss", "second test loss"):
        assert f"| {title} |" in head
        assert f"| {title}, fine-tuned |" in head
    assert [row["method"] for row in rows] == ["uniform", "classifier", "soba"]
    for row in rows:
        for prefix in ("", "finetuned_"):
            each = [row[f"{prefix}test_loss/{name}"] for name in ("first", "second")]
            assert each[0] != each[1]
            assert row[f"{prefix}test_loss"] == pytest.approx(np.mean(each))
        assert row["finetuned_valid_loss"] <= row["valid_loss"]


def test_a_run_that_diverged_is_a_dash(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(step: Any, state: Any, **given: Any) -> Any:
        if "soba" in str(given["run_dir"]):
            raise TrainingDiverged("The loss is not finite.", step=2)
        return train(step, state, **given)

    monkeypatch.setattr("bilevel.study.run.train", diverging)
    for _ in range(2):
        with pytest.raises(SystemExit):
            call("analyse", "multi_task", more=SETS, compare="soba,uniform", finetune__steps=0, steps=4)
        printed = capsys.readouterr()
        assert "| soba | 0 of 1 | – |" in printed.out
        assert "| uniform | 1 |" in printed.out
        assert "soba-seed0 diverged" in printed.err
        assert "1 of the runs diverged and are dashes" in printed.err
        assert (tmp_path / "run" / "multi_task.md").read_text().strip() in printed.out
    assert "<svg" in (tmp_path / "run" / "multi_task.svg").read_text()


def test_specific_batches_come_from_the_tasks_as_often_as_asked(tmp_path: Path) -> None:
    setting = setting_of(MultiTask(task_weights=(3.0, 1.0)), tmp_path, specific_sets=("first", "second"))
    this = Run(setting.context("soba", 0))
    loader = loaders(this.context, this.plan)[1]
    count, steps = 0, 1000
    for step in range(steps):
        domains = set(loader.batch(step)["domain"].tolist())
        assert len(domains) == 1  # a batch is of one task
        count += domains == {0}
    assert abs(count - 0.75 * steps) < 4.5 * math.sqrt(steps * 0.75 * 0.25)


BAD = {
    "no steps": ("filters", {"steps": 0}, (), "--steps 0 must be at least 1"),
    "no seeds": ("filters", {"seeds": 0}, (), "--seeds 0 must be at least 1"),
    "evaluation": ("transfer", {}, ("--eval-only",), "--eval-only is not for bilevel analyse transfer"),
    "a search": ("filters", {"trials": 2}, (), "--trials is not for"),
    "several sets": ("filters", {}, SETS, "--specific-sets is not for"),
    "several hosts": ("transfer", {"hosts__coordinator": "host:1"}, (), "--hosts.coordinator is not for"),
    "a method that learns nothing": ("curriculum", {"learner": "classifier"}, (), "--learner classifier does not learn"),
    "several methods": ("filters", {"compare": "soba,dds"}, (), "--compare is not for"),
    "no snapshots": ("curriculum", {"snapshots": 0}, (), "--snapshots 0 must be at least 1"),
    "resident": ("curriculum", {"resident": "always"}, (), "--resident always does not go with replaying"),
    "dense": ("curriculum", {"soba__mode": "dense"}, (), "--soba.mode dense is not for this analysis"),
    "a filter twice": ("filters", {}, ("--filters", "top_k", "top_k"), "--filters top_k top_k: name"),
    "specific rows among the big batch": (
        "filters", {"soba__specific_candidates": 2}, (), "--soba.specific-candidates does not go with this analysis",
    ),
    "batches that are too large": ("acceleration", {"batch_rows": 5000}, (), "--batch-rows 5000"),
    "one pair": ("acceleration", {"pairs": 1}, (), "--pairs 1 must be at least 2"),
    "two sets of a name": ("acceleration", {}, ("--specific-sets", "a/x.txt", "b/x.txt"), 'has two sets named "x"'),
    "gain of fine-tuning": ("acceleration", {"finetune__steps": 5}, (), "--finetune.steps is not for"),
    "one size": ("transfer", {"large": "linear"}, (), "--small linear --large linear: give the networks of two models"),
    "no large size": ("transfer", {}, (), "--small linear --large None: give the networks of two models"),
    "another size": ("transfer", {"large": "cubic"}, (), "sets model.network to 'cubic', which must be 'linear', 'affine'"),
    "no sets": ("multi_task", {}, (), "--specific-sets names 0 specific sets: give at least two"),
    "a set twice": ("multi_task", {}, ("--specific-sets", "a", "a"), 'has two sets named "a"'),
    "a weight too few": (
        "multi_task", {}, (*SETS, "--task-weights", "1"), "--task-weights has 1 numbers for 2 specific sets",
    ),
    "a negative weight": (
        "multi_task", {}, (*SETS, "--task-weights", "2", "-1"), "The task weights are [2.0, -1.0] for 2 data sets",
    ),
    "a setting of a later run": (
        "filters", {"soba__top_fraction": 2.0}, ("--filters", "uniform", "top_fraction"), "top_fraction",
    ),
    "a setting of a later method": (
        "multi_task", {"mixing__fraction": 1.5}, (*SETS, "--compare", "uniform,mixing"), "--mixing.fraction 1.5",
    ),
    "a missing set": ("multi_task", {}, ("--specific-sets", "first", "nowhere"), "nowhere does not exist"),
    "frozen weights": (
        "multi_task", {"compare": "uniform,frozen"}, SETS, "--compare names frozen, which takes what another run left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_sentence(case: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, given, more, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        call("analyse", name, more=more, **given)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("metrics.jsonl")), "nothing was trained"


def test_names_are_those_of_the_command_line() -> None:
    from bilevel import cli

    assert tuple(ANALYSES) == cli.ANALYSES
    assert all(name in METHODS for name in LEARNING)


@pytest.mark.slow
def test_text(texts: list[str], tmp_path: Path) -> None:
    main(["analyse", "curriculum", "language_modeling", *texts, "--snapshots", "2", "--big-batch-size", "8"])
    assert [row["method"] for row in results(tmp_path / "run", "curriculum")][-1] == "replayed"


@pytest.mark.slow
def test_images_whose_weighting_network_is_as_large_as_the_model(digits: list[str], tmp_path: Path) -> None:
    main(
        [
            "analyse",
            "transfer",
            "image_classification",
            *digits,
            "--small",
            "mlp-small",
            "--large",
            "mlp",
            "--big-batch-size",
            "8",
        ]
    )
    *_, own, reused = results(tmp_path / "run", "transfer")
    assert (own["method"], reused["method"]) == ("mlp: soba", "mlp: weights from mlp-small")
    assert 0 <= reused["test_accuracy"] <= 1
    small, large = (
        load_tree(tmp_path / "run" / folder / "weights.safetensors")[0]
        for folder in ("mlp-small/soba-seed0", "mlp/frozen-seed0")
    )
    assert jax.tree.structure(small) == jax.tree.structure(large)
    for learned, used in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        np.testing.assert_array_equal(learned, used)
