"""What one part of a method's run hands to the next: weights, irreducible losses, entropies, scores, sequences."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from linear_task import TASK as LINEAR
from study_calls import CLASSES, call, changed, fails, metrics, result, rows, same_result, weights

from bilevel.data import RowView
from bilevel.files import load_tree
from bilevel.offline.contrastive import load_gains
from bilevel.offline.irreducible import half
from bilevel.offline.loss_table import LossTable
from bilevel.study import contrastive, known_rows, resolve, run
from bilevel.study.context import Setting
from bilevel.study.feeding import loaders
from bilevel.study.run import Run
from bilevel.study.suite import opened
from bilevel.training import Checkpoints, load_sequence, read_metrics
from bilevel.training.best import Best
from bilevel.training.best_weights import BEST as BEST_WEIGHTS
from bilevel.training.evaluation import trained
from bilevel.training.fit import BEST
from bilevel.training.settings import filled
from bilevel.types import UserError

pytestmark = pytest.mark.usefixtures("one_device")


def setting_of(folder: Path, *, study: dict[str, Any] | None = None, task: dict[str, Any] | None = None) -> Setting:
    """The linear task with other settings, as the suite opens it."""
    config = resolve.default_config(LINEAR)
    own = filled(config.task, task or {}, "the test")
    config = resolve.complete(
        resolve.Config(filled(config.study, {"run_dir": str(folder), **(study or {})}, "the test"), own,
                       config.methods, config.prepared)
    )  # fmt: skip
    return opened(config, LINEAR)


def with_method(setting: Setting, name: str, **values: Any) -> Setting:
    return setting.of(setting.config.with_method(name, filled(setting.config.methods[name], values, "the test")))


def tables(folder: Path) -> list[Path]:
    return sorted((folder / "prepared").glob("*/table.safetensors"))


def test_retrained_begins_with_the_weights_that_dds_ended_with(tmp_path: Path) -> None:
    """α does not move where its rate grows from 0 for ever."""
    still = ("--retrained-dds.weight-warmup", 10**6)
    call(tmp_path, "retrained_dds", *still, "--finetune.steps", 0)
    dds = weights(tmp_path / "dds-seed0")
    assert np.abs(dds).max() > 0
    np.testing.assert_allclose(weights(tmp_path / "retrained_dds-seed0"), dds, atol=1e-6)
    row = result(tmp_path, "retrained_dds")
    assert row["preparation_steps"] == 8
    head, _, line = (tmp_path / "comparison.md").read_text().splitlines()[:3]
    assert dict(zip(head.split("|"), line.split("|"), strict=True))[" steps before "] == " 8 "
    assert row["preparation_seconds"] == pytest.approx(result(tmp_path, "dds")["seconds"])
    assert row["seconds"] > row["preparation_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--trials", 2, "--trial-steps", 2), ("--same-seconds", "--budget-seconds", 0.001)])
def test_retrained_beside_a_dds_with_settings_of_its_own(tmp_path: Path, more: tuple[Any, ...]) -> None:
    """The search gives dds a learning rate, the budget of seconds steps, that are not those of the retrained run."""
    call(tmp_path, "retrained_dds,dds", *more)
    assert {row["method"] for row in rows(tmp_path)} == {"dds", "retrained_dds"}


def test_a_warm_start_begins_with_the_classifier(tmp_path: Path) -> None:
    call(tmp_path, "classifier,warm_soba", "--warm-soba.weight-warmup", 10**6, "--warm-soba.weight-learning-rate", 0.01,
         "--classifier.steps", 60, "--warm-soba.classifier-steps", 60)  # fmt: skip
    known = weights(tmp_path / "classifier-seed0")
    assert known[0] > known[1] + 0.1 > known[1]
    assert known[0] > known[2] + 0.1
    np.testing.assert_allclose(weights(tmp_path / "warm_soba-seed0"), known, atol=1e-6)
    row = result(tmp_path, "classifier")
    # The classifier's table is of domains: among generic rows a third are of the specific one.
    best = -(0.5 * math.log(3 / 4) + 0.5 * (math.log(1 / 4) / 3))
    assert best <= row["classifier_valid_loss"] < math.log(2)
    assert row["seconds"] > row["preparation_seconds"] > 0
    assert {row["share/noise"] for row in metrics(tmp_path / "classifier-seed0")} == {0.0}, (
        "top_k takes the best domain"
    )


def test_frozen_takes_the_weights_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever that lies later; other weights at the same place are refused."""
    source, moved, folder = tmp_path / "source" / "soba-seed0", tmp_path / "moved", tmp_path / "run"
    call(tmp_path / "source", "soba")
    call(folder, "frozen", "--frozen.weights", source)
    np.testing.assert_array_equal(weights(folder / "frozen-seed0"), weights(source))
    source.rename(moved)
    call(folder, "frozen", "--frozen.weights", moved)
    call(tmp_path / "source", "soba", "--seed", 1)
    fails(folder, "frozen", "--frozen.weights", tmp_path / "source" / "soba-seed1")
    assert "holds a run with other settings (frozen.weights_digest was" in capsys.readouterr().err
    (moved / "weights.safetensors").write_bytes(b"cut off")
    fails(tmp_path / "new", "frozen", "--frozen.weights", moved)
    assert "weights.safetensors cannot be read as a safetensors file" in capsys.readouterr().err
    fails(tmp_path / "new", "frozen", "--frozen.weights", tmp_path / "nowhere")
    assert "weights.safetensors does not exist: give the directory of a finished run" in capsys.readouterr().err
    fails(tmp_path / "new", "frozen")
    assert "needs --frozen.weights: the directory METHOD-seedN" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_irreducible_losses_are_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For another method with a second seed, and another run directory that is given the table."""
    steps = ("--rho-loss.held-out-steps", 4)
    call(tmp_path / "run", "rho_loss", *steps)
    (table,) = tables(tmp_path / "run")
    written = table.stat().st_mtime_ns
    call(tmp_path / "run", "irreducible_loss", "--irreducible-loss.held-out-steps", 4, "--seed", 1)
    assert tables(tmp_path / "run") == [table]
    assert table.stat().st_mtime_ns == written
    moved = tmp_path / "table.safetensors"
    shutil.copy(table, moved)
    call(tmp_path / "again", "rho_loss", *steps, "--rho-loss.table", table)
    assert tables(tmp_path / "again") == []
    first, other = result(tmp_path / "run", "rho_loss"), result(tmp_path / "again", "rho_loss")
    assert other["test_loss"] == first["test_loss"]
    counted = json.loads((table.parent / known_rows.SECONDS).read_text())
    assert counted["training"] > 0 <= counted["scoring"], "the first batch of scoring is not counted"
    for row in (first, other, result(tmp_path / "run", "irreducible_loss", seed=1)):
        assert row["preparation_seconds"] == pytest.approx(sum(counted.values())), (
            "a table is no cheaper where it is used again"
        )
    call(tmp_path / "again", "rho_loss", *steps, "--rho-loss.table", moved)  # the same table elsewhere
    known = LossTable.load(moved, content_hash=setting_of(tmp_path).splits.train.content_hash, settings=None)
    LossTable(-known.losses, known.content_hash, known.settings).save(moved)
    fails(tmp_path / "again", "rho_loss", *steps, "--rho-loss.table", moved)
    assert "holds a run with other settings (rho_loss.table_digest was" in capsys.readouterr().err
    fails(tmp_path / "b", "rho_loss", "--rho-loss.table", table, "--data.rows", 120)
    assert "holds losses of data with the content hash" in capsys.readouterr().err
    LossTable(known.losses, known.content_hash, {**known.settings, "number": "entropy"}).save(moved)
    fails(tmp_path / "b", "rho_loss", "--rho-loss.table", moved)
    assert "holds the entropy of each row, not irreducible losses" in capsys.readouterr().err
    call(tmp_path / "run", "rho_loss", "--rho-loss.held-out-steps", 5, "--seed", 2)
    assert len(tables(tmp_path / "run")) == 2, "a model of other steps has a table of its own"


def test_rho_loss_picks_the_largest_reducible_losses(tmp_path: Path) -> None:
    """The rows of the first step are the top of ℓ − IL, by numpy."""
    setting = with_method(setting_of(tmp_path), "rho_loss", held_out_steps=4)
    this = Run(setting.context("rho_loss", 0))
    step, (state, _) = this.parts[0], this.started()
    (file,) = tables(tmp_path)
    table = LossTable.load(file, content_hash=setting.splits.train.content_hash, settings=None).losses
    from bilevel.data import Loader

    batch = Loader(setting.splits.train, 16, seed=0).batch(0)
    w = np.asarray(state.params["w"])
    reducible = (batch["x"] @ w - batch["y"]) ** 2 - table[batch["id"]]
    _, found = jax.jit(step.step)(state, batch, setting.splits.specific.rows(np.arange(4)))
    assert set(np.asarray(found["ids"])) == set(batch["id"][np.argsort(-reducible)[:4]])


def test_each_half_is_scored_by_the_model_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without held-out rows; each model sees its own half only."""
    setting = with_method(setting_of(tmp_path), "rho_loss", halves=True, held_out_steps=10)
    fitted: list[tuple[np.ndarray, np.ndarray]] = []
    original = known_rows.Fit.__call__

    def fit(self: Any, folder: Path) -> Any:
        assert isinstance(self.rows, RowView)
        found = original(self, folder)
        fitted.append((self.rows.rows(np.arange(len(self.rows)))["id"], np.asarray(found[0].params["w"])))
        return found

    monkeypatch.setattr(known_rows.Fit, "__call__", fit)
    context = setting.context("rho_loss", 0)
    losses = known_rows.irreducible_losses(context, setting.config.methods["rho_loss"]).table.losses
    (first, one), (second, two) = fitted
    assert sorted([*first, *second]) == list(range(240))
    everything = setting.splits.train.rows(np.arange(240))
    assert np.abs(one - two).max() > 1e-3
    for own, other in ((first, two), (second, one)):
        wanted = (everything["x"][own] @ other - everything["y"][own]) ** 2
        np.testing.assert_allclose(losses[own], wanted, rtol=1e-4)
    np.testing.assert_array_equal(
        np.sort(first), np.sort(half(setting.splits.train, 0, 0).rows(np.arange(len(first)))["id"])
    )


def test_a_model_scores_as_many_rows_at_once_as_it_takes(tmp_path: Path) -> None:
    """The model of the linear task refuses half of such a big batch."""
    given = ("--big-batch-size", 120, "--steps", 2)
    call(tmp_path, "train_loss,meta_weight_net", *given, "--meta-weight-net.mode", "sparse")
    assert all(math.isfinite(row["test_loss"]) for row in rows(tmp_path))


@pytest.mark.parametrize(("method", "count"), [("soba", 3), ("classifier", 3), ("uniform", 0)])
def test_specific_candidates_stand_in_every_big_batch(tmp_path: Path, method: str, count: int) -> None:
    setting = setting_of(tmp_path)
    setting = with_method(setting, method, specific_candidates=count) if count else setting
    this = Run(setting.context(method, 0))
    batch = loaders(this.context, this.plan)[0].batch(5)
    assert len(batch["id"]) == (16 if count else 4)
    assert (batch["id"] == -1).sum() == count
    np.testing.assert_allclose(batch["y"][batch["id"] < 0], batch["x"][batch["id"] < 0].sum(1), rtol=1e-4)


def test_without_held_out_rows_a_flag_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(tmp_path / "a", "rho_loss", task=changed(tmp_path, "held_out=parts[3]", "held_out=None"))
    assert "has no held-out rows to learn irreducible losses from: give" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_svp_keeps_the_rows_of_highest_entropy(tmp_path: Path) -> None:
    given = ("--svp.steps", 20, "--svp.fraction", 0.25)
    call(tmp_path, "svp", *CLASSES, *given, "--seeds", 2)
    (table,) = tables(tmp_path)
    setting = setting_of(tmp_path, task={"data": {"classes": 2}, "model": {"network": "classes"}})
    setting = with_method(setting, "svp", steps=20, fraction=0.25)
    context = setting.context("svp", 0)
    plan = Run(context).plan
    assert plan.rows is not None
    data = plan.rows()
    kept = data.rows(np.arange(len(data)))["id"]
    model = context.model()
    with Checkpoints(table.parent / "model" / BEST, read_only=True) as saved:
        restored = saved.restore_latest(Best(*model.init(jax.random.key(0))))
    assert restored is not None
    tree = restored[1].params
    (kernel,) = (x for x in jax.tree.leaves(tree) if np.shape(x) == (4, 2))
    (bias,) = (x for x in jax.tree.leaves(tree) if np.shape(x) == (2,))
    everything = context.splits.train.rows(np.arange(240))
    logits = everything["x"] @ np.asarray(kernel) + np.asarray(bias)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum(1)
    assert set(kept.tolist()) == set(np.argsort(-entropy)[:60].tolist())


def test_a_proxy_scores_and_the_target_is_evaluated(tmp_path: Path) -> None:
    """The target begins as without a proxy; irreducible losses are those of its own network."""
    alone = with_method(setting_of(tmp_path), "rho_loss", held_out_steps=2)
    both = with_method(alone, "rho_loss", network="affine")
    plans = [Run(setting.context("rho_loss", 0)).plan for setting in (alone, both)]
    key = jax.random.key(0)
    (plain, _), (pair, _) = (plan.model.init(key) for plan in plans)
    np.testing.assert_array_equal(pair["target"]["w"], plain["w"])
    assert set(pair["proxy"]) == {"w", "b"}
    assert "affine, which is trained along on the rows picked" in plans[1].about["scored_by"]
    assert "the target itself" in plans[0].about["scored_by"]
    this = Run(both.context("rho_loss", 0))
    this.prepare()
    found, state = this.train()
    assert found["scored_by"] == plans[1].about["scored_by"]
    batch = both.splits.test["specific"].rows(np.arange(20))
    w = np.asarray(trained(state, both.mesh)[0]["target"]["w"])
    assert found["test_loss"] == pytest.approx(((batch["x"] @ w - batch["y"]) ** 2).mean(), rel=1e-5)


CONTRASTIVE = ("--contrastive.finetune-steps", 60, "--contrastive.fraction", 0.25, "--finetune.learning-rate", 0.05)


def test_contrastive_selects_what_fine_tuning_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on from a kill between its phases, to the same result."""
    call(tmp_path / "whole", "contrastive", *CONTRASTIVE)
    whole, folder = result(tmp_path / "whole", "contrastive"), tmp_path / "whole" / "contrastive-seed0"
    setting = setting_of(tmp_path)
    scores = load_gains(folder / contrastive.NAME, setting.splits.train, setting.splits.specific).losses
    assert np.isfinite(scores).all()
    best = np.argsort(-scores)[:60]
    shares = [row["share/first"] for row in metrics(folder)]
    assert np.mean(best % 3 == 0) > 0.6 > 1 / 3
    assert np.mean(shares[2:]) > 0.6, "a third are like the specific rows before selection"
    assert whole["preparation_step"] == 4
    assert whole["seconds"] > whole["preparation_seconds"] > 0
    for phase in ("_scored", "highest_fraction"):  # before any score, and when all are kept
        with monkeypatch.context() as patch:
            patch.setattr(contrastive, phase, None)
            with pytest.raises(TypeError):
                call(tmp_path / phase, "contrastive", *CONTRASTIVE)
        assert (tmp_path / phase / "contrastive-seed0" / contrastive.NAME).exists() == (phase != "_scored")
        if phase != "_scored":
            monkeypatch.setattr(contrastive, "_scored", None)  # nothing is scored again
        call(tmp_path / phase, "contrastive", *CONTRASTIVE)
        assert same_result(result(tmp_path / phase, "contrastive"), whole)


def test_scores_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run selects by is what it was begun with, wherever the file lies."""
    splits, file = setting_of(tmp_path).splits, tmp_path / "scores.safetensors"
    gains = np.random.default_rng(0).normal(size=240).astype(np.float32)

    def save(
        values: np.ndarray, train: str = splits.train.content_hash, own: str = splits.specific.content_hash
    ) -> None:
        LossTable(values, train, {"specific_hash": own}).save(file)

    given = ("--contrastive.fraction", 0.1, "--contrastive.scores")
    save(gains)
    call(tmp_path / "run", "contrastive", *given, file)
    selected = {i % 3 for i in np.argsort(-gains)[:24]}
    assert selected == {0, 1, 2}
    file.rename(tmp_path / "moved")
    call(tmp_path / "run", "contrastive", *given, tmp_path / "moved")
    save(-gains)
    fails(tmp_path / "run", "contrastive", *given, file)
    assert "holds a run with other settings (contrastive.scores_digest was" in capsys.readouterr().err
    for values, train, own, words in (
        (np.where(np.arange(240) < 20, gains, np.nan), None, None, "--contrastive.fraction 0.1 of 20 scored rows keeps"),
        (gains, "0", None, "content hash 0, but these data have"),
        (gains, None, "0", "for other specific data (hash 0, here"),
    ):  # fmt: skip
        save(values.astype(np.float32), train or splits.train.content_hash, own or splits.specific.content_hash)
        fails(tmp_path / "new", "contrastive", *given, file)
        assert words in capsys.readouterr().err
    file.write_bytes(b"no table")
    fails(tmp_path / "new", "contrastive", *given, file)
    assert str(file) in capsys.readouterr().err
    fails(tmp_path / "new", "contrastive", *given, tmp_path / "nowhere")
    assert f"There are no scores at {tmp_path / 'nowhere'}: give --contrastive.scores" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


SAMPLER = (*CLASSES, "--rl-sampler.policy-every", 4, "--rl-sampler.reward-every", 2, "--rl-sampler.summary-size", 3,
           "--rl-sampler.logger-size", 5, "--rl-sampler.policy-size", 4)  # fmt: skip


@pytest.mark.slow
def test_sequences_are_kept_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows drawn are the rows trained on; replayed they give the same model."""
    call(tmp_path / "run", "rl_sampler", *SAMPLER)
    own = tmp_path / "run" / "rl_sampler-seed0"
    drawn = load_sequence(own / "sequence.safetensors", content_hash=None, num_rows=240)
    assert drawn.shape == (8, 4)
    history = read_metrics(own / "metrics.jsonl")
    assert [row["step"] for row in history if row.get("reward") is not None and np.isfinite(row["reward"])] == [
        2,
        4,
        6,
        8,
    ]
    assert [row["step"] for row in history if np.isfinite(row.get("policy_loss") or np.nan)] == [4, 8]
    assert history[0]["share/noisy"] == pytest.approx(np.mean(drawn[:2] % 3 == 2))
    found = json.loads((own / "frequencies.json").read_text())
    counts = np.bincount(drawn.ravel(), minlength=240)
    kept, _ = load_tree(own / "counts.safetensors")
    np.testing.assert_array_equal(kept["counts"], counts)
    assert found["draws"] == 32
    assert found["rewards"] == {"all": 4, "a_row": pytest.approx(4 / 240)}
    assert "warnings" not in result(tmp_path / "run", "rl_sampler")
    assert list(found["classes"]["counts"].values()) == np.bincount(drawn.ravel() % 3, minlength=3).tolist()
    row = result(tmp_path / "run", "rl_sampler")
    assert row["spread"] == pytest.approx(counts.var() / counts.mean())
    assert "noisy_often" in row
    assert not (own / "sequence.part").exists()
    assert "<svg" in (own / "frequencies.svg").read_text()
    call(tmp_path / "again", "replayed", *CLASSES, "--replayed.sequence", own)
    replayed = json.loads((tmp_path / "again" / "replayed-seed0" / "frequencies.json").read_text())
    assert replayed["rewards"]["all"] == 0
    assert result(tmp_path / "again", "replayed")["test_loss"] == pytest.approx(row["test_loss"], rel=1e-5)
    again = tmp_path / "again" / "replayed-seed0" / "sequence.safetensors"
    np.testing.assert_array_equal(load_sequence(again, content_hash=None, num_rows=240), drawn)
    capsys.readouterr()
    call(tmp_path / "run", "rl_sampler", *SAMPLER, "--eval-only")
    assert f"{row['test_loss']:.3f}" in capsys.readouterr().out
    shutil.copytree(own, tmp_path / "elsewhere")
    call(tmp_path / "again", "replayed", *CLASSES, "--replayed.sequence", tmp_path / "elsewhere")
    call(tmp_path / "narrow", "rl_sampler", *SAMPLER, "--rl-sampler.policy-learning-rate", 100, "--steps", 32)
    text = capsys.readouterr().out
    assert "Warning: rl_sampler, seed 0: by step " in text
    assert "below the 4 of a batch" in text
    assert "raise --rl-sampler.entropy-bonus" in text
    # A policy that another run learned: it learns on, or stays as it is.
    given, start = (*SAMPLER, "--seed", 3, "--rl-sampler.start-from"), own
    call(tmp_path / "on", "rl_sampler", *given, start, "--steps", 4)
    call(tmp_path / "fixed", "rl_sampler", *given, start, "--steps", 4, "--rl-sampler.fixed")
    before, on, fixed = (
        [np.asarray(x) for x in jax.tree.leaves(load_tree(folder / "sampler.safetensors")[0])]
        for folder in (own, tmp_path / "on" / "rl_sampler-seed3", tmp_path / "fixed" / "rl_sampler-seed3")
    )
    most = max(np.abs(a - b).max() for a, b in zip(on, before, strict=True))
    assert 0 < most < 0.05, "one update by Adam moves a parameter by its rate, 0.04, at most"
    for a, b in zip(fixed, before, strict=True):
        np.testing.assert_array_equal(a, b)
    sequence, policy = (
        ("replayed", *CLASSES, "--replayed.sequence"),
        ("rl_sampler", *SAMPLER, "--rl-sampler.start-from"),
    )
    for flags, words in (
        ((*sequence, tmp_path), "sequence.safetensors does not exist"),
        ((*sequence, own / "sampler.safetensors"), "holds a learned sampler, not a sequence"),
        ((*sequence, own, "--data.rows", 120), "belongs to data with 240 rows, and the data at hand have"),
        ((*sequence, own, "--data.rows", 120, "--replayed.other-data"), "belongs to data with 240 rows"),
        ((*sequence, own, "--batch-size", 8), "has 4 rows a step, but --batch-size is 8"),
        ((*sequence, own, "--steps", 10), "The sequence has 8 steps, and 10 are asked for"),
        ((*policy, tmp_path / "no.safetensors"), "no.safetensors does not exist"),
        ((*policy, own, "--rl-sampler.policy-size", 8), "does not fit: its"),
        ((*sequence, own, "--resident", "never"), "--resident never does not fit replayed"),
    ):
        fails(tmp_path / "new", *map(str, flags))
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_continued_sampled_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within a window of the policy, whose hidden states, draws and rewards go on."""
    call(tmp_path / "whole", "rl_sampler", *SAMPLER, "--checkpoint-every", 2)
    cut = tmp_path / "cut" / "rl_sampler-seed0"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "loop", _stopping(6))
        patch.setattr(run, "_summary", None)  # at the end, before what was drawn is kept
        with pytest.raises(TypeError):
            call(tmp_path / "cut", "rl_sampler", *SAMPLER, "--checkpoint-every", 2)
    assert not (cut / "result.json").exists()
    call(tmp_path / "cut", "rl_sampler", *SAMPLER, "--checkpoint-every", 2)
    whole = tmp_path / "whole" / "rl_sampler-seed0"
    assert same_result(result(tmp_path / "cut", "rl_sampler"), result(tmp_path / "whole", "rl_sampler"))
    for name in ("sequence.safetensors", "sampler.safetensors"):
        for a, b in zip(*(jax.tree.leaves(load_tree(folder / name)[0]) for folder in (cut, whole)), strict=True):
            np.testing.assert_array_equal(a, b)


def _stopping(step: int) -> Any:
    loop = Run.loop

    def stops(self: Run, steps: int, source: Any) -> Any:
        return dataclasses.replace(loop(self, steps, source), num_steps=min(steps, step))

    return stops


@pytest.mark.slow
def test_measures_that_are_better_when_higher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, fine-tuning, ranks and irreducible losses of a task that has no loss among its measures."""
    new = '(Measure("gain", "gain", 3, lower_is_better=False),)'
    task = changed(tmp_path, '(Measure("loss", "loss", 3, "squared units"),)', new)
    measured = "return mean_evaluator(model.evaluation, AT_ONCE)"
    assert measured in task.read_text()
    gained = (
        f'{measured.replace("return", "found =")}\n        return lambda *given: {{"gain": -found(*given)["loss"]}}'
    )
    task.write_text(task.read_text().replace(measured, gained))
    call(
        tmp_path / "run",
        "uniform,mixing",
        "--finetune.steps",
        300,
        "--finetune.learning-rate",
        0.01,
        "--batch-size",
        8,
        task=task,
    )
    trials = json.loads((tmp_path / "run" / "search" / "mixing_fraction" / "trials.json").read_text())
    assert trials["best"] == max(trials["trials"], key=lambda trial: trial["valid_gain"])
    found = {row["method"]: row for row in rows(tmp_path / "run")}
    for row in found.values():
        assert row["finetuned_valid_gain"] > row["valid_gain"]
        assert row["finetuned_steps"] > 0
    best = max(found.values(), key=lambda row: row["test_gain"])["method"]
    (line,) = [x for x in (tmp_path / "run" / "tables.md").read_text().splitlines() if x.startswith(f"| {best} ")]
    assert "①" in line.split("|")[2]
    call(tmp_path / "run", "rho_loss", "--rho-loss.held-out-steps", 2, "--batch-size", 8, task=task)


@pytest.mark.slow
def test_the_curriculum_region_of_spcl_comes_from_a_table(tmp_path: Path) -> None:
    """Irreducible losses of 0 for two domains and 1 for the third: with a small bound the third has no weight."""
    table = LossTable((np.arange(240) % 3 == 2).astype(np.float32), setting_of(tmp_path).splits.train.content_hash, {})
    table.save(tmp_path / "table.safetensors")
    given = ("--spcl.pace-start", 30, "--spcl.pace-end", 30)
    call(tmp_path / "plain", "spcl", *given)
    call(tmp_path / "region", "spcl", *given, "--spcl.table", tmp_path / "table.safetensors", "--spcl.bound", 1e-6)
    plain, region = (result(tmp_path / name, "spcl")["share/noisy"] for name in ("plain", "region"))
    assert plain > 0.2
    assert region < 1e-3
    assert "table_digest" in resolve.read_file(tmp_path / "region" / "spcl-seed0" / "config.yaml")["spcl"]


@pytest.mark.parametrize(
    ("classes", "values", "message"),
    [
        (2, {"bound": 0.5}, "--spcl.table and --spcl.bound make a curriculum region together"),
        (1, {}, r"log\(classes\), which is 0 with one class"),
        (2, {"pace_start": -1.0}, "--spcl.pace-start -1.0 must not be negative"),
        (2, {"pace_end": 0.0}, "--spcl.pace-end 0.0 must be positive"),
    ],
)
def test_spcl_needs_a_pace(tmp_path: Path, classes: int, values: dict[str, float], message: str) -> None:
    setting = with_method(setting_of(tmp_path, task={"data": {"classes": classes}}), "spcl", **values)
    with pytest.raises(UserError, match=message):
        Run(setting.context("spcl", 0))


def test_methods_take_the_best_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of soba, whose valid loss rises again where θ's steps are far too long; of dds; and of a run without."""
    given: tuple[Any, ...] = ("--evaluate-every", 1, "--optimizer.name", "sgd", "--optimizer.learning-rate", 0.2)
    call(tmp_path / "run", "soba", *given)
    source = tmp_path / "run" / "soba-seed0"
    rows = metrics(source)
    best = min((row for row in rows if "valid_loss" in row), key=lambda row: row["valid_loss"])
    tree, about = load_tree(source / BEST_WEIGHTS)
    assert int(about["step"]) == best["step"] < rows[-1]["step"]
    assert tree["of"].tolist() != weights(source).tolist()
    for at, wanted in (("end", weights(source)), ("best", tree["of"])):
        call(tmp_path / at, "frozen", "--frozen.weights", source, "--frozen.at", at)
        assert weights(tmp_path / at / "frozen-seed0").tolist() == wanted.tolist()
    still = ("--retrained-dds.weight-warmup", 10**6, "--retrained-dds.at", "best")
    call(tmp_path / "dds", "retrained_dds", *given, *still)
    begun, _ = load_tree(tmp_path / "dds" / "dds-seed0" / BEST_WEIGHTS)
    assert weights(tmp_path / "dds" / "retrained_dds-seed0") == pytest.approx(begun["of"], abs=1e-5)
    assert result(tmp_path / "dds", "retrained_dds")["preparation_steps"] == 8
    (source / BEST_WEIGHTS).unlink()
    fails(tmp_path / "none", "frozen", "--frozen.weights", source, "--frozen.at", "best")
    assert "learned no weights while it trained: give --frozen.at end." in capsys.readouterr().err


def test_weights_of_domains_are_a_table_by_row_number(tmp_path: Path) -> None:
    """The linear task's own network is a table of domains, which it reads from the rows: both learn the same."""
    call(tmp_path / "rows", "soba", "--steps", 40)
    call(tmp_path / "domains", "soba", "--steps", 40, "--weigh", "domains")
    own = weights(tmp_path / "rows" / "soba-seed0")
    run = tmp_path / "domains" / "soba-seed0"
    table, _ = load_tree(run / "weights.safetensors", {"logit": np.zeros(4, np.float32)})
    np.testing.assert_allclose(np.asarray(table["logit"])[:3], own, rtol=1e-5)
    shares = json.loads((run / "domains.json").read_text())
    expected = np.exp(own) / np.exp(own).sum()  # a third of the rows each
    np.testing.assert_allclose([shares[name] for name in ("first", "second", "noise")], expected, rtol=1e-5)
    assert shares["first"] > shares["second"], "the specific rows are like the first domain"


def test_weights_of_domains_need_domains_and_no_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = changed(tmp_path, '"domain": Known(mixed, DOMAINS),', "")
    fails(tmp_path / "run", "soba", "--weigh", "domains", task=bare)
    assert "--weigh domains needs the domain of each generic row: give --data.generic-labels" in capsys.readouterr().err
    fails(tmp_path / "run", "warm_soba", "--weigh", "domains")
    assert "warm_soba begins with a domain classifier of rows" in capsys.readouterr().err
