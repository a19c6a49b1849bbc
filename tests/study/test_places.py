"""Where a run's state and processes are: split over devices, on two hosts; and what is kept of its weights and rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from linear_task import TASK as LINEAR
from study_calls import TASK, call, result, rows, two_processes, weights

from bilevel.data import ArrayDataset
from bilevel.devices import sharding
from bilevel.files import load_tree
from bilevel.study import resolve
from bilevel.study.context import Setting
from bilevel.study.task import Known, Splits, Weighting
from bilevel.study.weights import save_weights
from bilevel.training.settings import read_file

TOGETHER = ("--batch-size", 8, "--big-batch-size", 16, "--finetune.steps", 10, "--finetune.learning-rate", 0.05)


def test_a_state_split_over_eight_devices_ends_like_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split: list[Any] = []
    original = sharding.split_state

    def watched(mesh: Any, state: Any) -> Any:
        split.append(mesh.size)
        return original(mesh, state, min_size=1)

    monkeypatch.setattr(sharding, "split_state", watched)
    call(tmp_path / "split", "soba", *TOGETHER, "--shard-state")
    assert split == [8, 8], "training and fine-tuning"
    one = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None: one)
    call(tmp_path / "one", "soba", *TOGETHER)
    found = [rows(tmp_path / name)[0] for name in ("split", "one")]
    for name in ("test_loss", "valid_loss/generic", "finetuned_test_loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of every host: what precedes training, models that score rows too, training, fine-tuning, the tables."""
    methods = "warm_soba,contrastive,rho_loss"
    own = ("--warm-soba.classifier-steps", 10, "--contrastive.finetune-steps", 10, "--contrastive.fraction", 0.25,
           "--warm-soba.specific-batch-size", 8, "--rho-loss.held-out-steps", 4)  # fmt: skip
    two_processes("compare", TASK, "--compare", methods, *TOGETHER, *own, "--run-dir", tmp_path / "two")
    one = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None: one)
    call(tmp_path / "one", methods, *TOGETHER, *own)
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a["method"] == b["method"]
        for name in ("test_loss", "finetuned_test_loss", "finetuned_steps"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    folders = [tmp_path / name / "warm_soba-seed0" for name in ("two", "one")]
    np.testing.assert_allclose(weights(folders[0]), weights(folders[1]), rtol=1e-3, atol=1e-4)
    best = [load_tree(folder / "weights_best.safetensors") for folder in folders]
    np.testing.assert_allclose(best[0][0]["of"], best[1][0]["of"], rtol=1e-3, atol=1e-4)
    assert best[0][1]["step"] == best[1][1]["step"]
    assert result(tmp_path / "two", "contrastive")["preparation_step"] == 4


def splits_of(count: int, known: dict[str, Known]) -> Splits:
    train = ArrayDataset({"x": np.arange(count, dtype=np.float32)}, name="rows")
    return Splits(train, train, {"valid": train}, {"test": train}, known=known)


def test_weights_that_are_kept_are_those_of_batches_drawn_at_random(tmp_path: Path) -> None:
    """A network that centres its batch, on rows sorted by class: classes differ by as much as their values do."""
    classes = np.repeat(np.arange(4), 65)[:250]
    splits = splits_of(250, {"last": Known((classes == 3).astype(int), ("no", "yes"), fault=True)})

    def logits(weights: Any, batch: Any) -> Any:
        value = batch["x"] // 65
        return value - value.mean()

    class Task:
        name = "rows"

        def weighting(self, config: Any, splits: Splits) -> Weighting:
            return Weighting(lambda key: {}, logits)

    config = resolve.default_config(LINEAR).with_study(run_dir=tmp_path)
    setting = Setting(config, Task(), splits, sharding.make_mesh(jax.devices()[:1]))  # pyright: ignore[reportArgumentType]
    context = setting.context("soba", 0)
    context.directory.mkdir()
    share = save_weights(context, 16, SimpleNamespace(weight_params={"a": jax.numpy.zeros(1)}))
    values = np.exp(classes - classes.mean())
    assert share["weight_on/last"] == pytest.approx(values[classes == 3].sum() / values.sum(), abs=0.02)
    ranked = read_file(context.directory / "ranked.json")
    assert {int(classes[i]) for i, _ in ranked["highest"]} == {3}
    assert {int(classes[i]) for i, _ in ranked["lowest"]} == {0}
