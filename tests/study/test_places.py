"""Where a run's data, state and processes are: on the device or travelling, split over devices, on two hosts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from linear_task import TASK as LINEAR
from study_calls import TASK, call, environment, free_port, result, rows, weights

from bilevel.data import ArrayDataset, Loader
from bilevel.devices import sharding
from bilevel.study import resolve
from bilevel.study.context import Context
from bilevel.study.observing import save_frequencies
from bilevel.study.task import Known, Splits, Weighting
from bilevel.study.weights import save_weights
from bilevel.training import Data, Replay, Resident, Sampled
from bilevel.training.opening import Residence, open_source, steps_in_call
from bilevel.training.resident import fits_on_device
from bilevel.types import UserError

ROWS, BYTES = 64, 12  # 8 of x, 4 of id
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


def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of every host: what precedes training, training, selection, fine-tuning, the tables."""
    methods = "warm_soba,contrastive"
    own = ("--warm-soba.classifier-steps", 10, "--contrastive.finetune-steps", 10, "--contrastive.fraction", 0.25,
           "--warm-soba.specific-batch-size", 8)  # fmt: skip
    flags = [
        *map(str, (*TOGETHER, *own)),
        "--run-dir",
        str(tmp_path / "two"),
        "--hosts.coordinator",
        f"127.0.0.1:{free_port()}",
    ]
    command = [
        sys.executable,
        "-m",
        "bilevel.cli",
        "compare",
        str(TASK),
        "--compare",
        methods,
        *flags,
        "--hosts.processes",
        "2",
    ]
    started = [
        subprocess.Popen([*command, "--hosts.process", str(i)], env=environment(), stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [process.communicate()[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error
    one = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None: one)
    call(tmp_path / "one", methods, *TOGETHER, *own)
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a["method"] == b["method"]
        for name in ("test_loss", "finetuned_test_loss", "finetuned_steps"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    folders = [tmp_path / name / "warm_soba-seed0" for name in ("two", "one")]
    np.testing.assert_allclose(weights(folders[0]), weights(folders[1]), rtol=1e-3, atol=1e-4)
    assert result(tmp_path / "two", "contrastive")["preparation_step"] == 4


class Device:
    """A device that says how much memory it has, or nothing."""

    def __init__(self, limit: int | None):
        self._stats = None if limit is None else {"bytes_limit": limit}

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def toy_loaders() -> list[Loader]:
    return [Loader(ArrayDataset({"x": np.ones((ROWS, 2), np.float32)}, name="toy"), 8, seed=0) for _ in range(2)]


def opened(residence: Residence = "auto", loaders: Sequence[Loader] = ()) -> Data | Resident:
    generic, specific = loaders or toy_loaders()
    return open_source(residence, generic, specific, sharding.make_mesh(jax.devices()[:1]))


def test_data_lie_on_the_device_unless_told_otherwise() -> None:
    assert isinstance(opened(), Resident)
    assert isinstance(opened("always"), Resident)
    assert isinstance(opened("never"), Data)


def test_only_batches_that_travel_take_a_call_each() -> None:
    streamed, held = opened("never"), opened("always")
    rows = toy_loaders()[0].dataset
    assert isinstance(streamed, Data)
    replayed = Replay(streamed, lambda step: {})
    assert [steps_in_call(source, 8) for source in (streamed, replayed, held, Sampled(rows, rows))] == [1, 1, 8, 8]


def test_what_does_not_fit_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    both = 2 * ROWS * BYTES
    loaders = toy_loaders()
    for limit, found in ((8 * both, Resident), (8 * both - 8, Data)):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "local_devices", lambda *_, limit=limit: [Device(limit)])
            assert isinstance(opened(loaders=loaders), found), limit
            assert isinstance(opened("always", loaders), Resident)
            assert isinstance(opened(loaders=[loaders[0]] * 2), Resident)  # one data set counts once


def test_devices_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(ArrayDataset):
        def __len__(self) -> int:
            return (1 << 30) // BYTES // 2

    huge = Loader(Large({"x": np.ones((ROWS, 2), np.float32)}, name="large"), 8, seed=0)
    for devices, fits in ((1, True), (2, True), (3, False)):
        monkeypatch.setattr(jax, "local_devices", lambda *_, devices=devices: [Device(None)] * devices)
        assert fits_on_device(huge, huge) is fits


def test_data_of_several_processes_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert isinstance(opened(), Data)
    with pytest.raises(UserError, match="Resident data are for one process, and this run has 2"):
        opened("always")


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

    mesh, nothing = sharding.make_mesh(jax.devices()[:1]), lambda name: (tmp_path, {})
    config, task = resolve.default_config(LINEAR), Task()
    context = Context(config, task, splits, "soba", 0, mesh, tmp_path, nothing)  # pyright: ignore[reportArgumentType]
    share = save_weights(context, 16, SimpleNamespace(weight_params={"a": jax.numpy.zeros(1)}))
    values = np.exp(classes - classes.mean())
    assert share["weight_on/last"] == pytest.approx(values[classes == 3].sum() / values.sum(), abs=0.02)
    ranked = resolve.read_file(tmp_path / "ranked.json")
    assert {int(classes[i]) for i, _ in ranked["highest"]} == {3}
    assert {int(classes[i]) for i, _ in ranked["lowest"]} == {0}


def test_frequencies(tmp_path: Path) -> None:
    """20 rows: 0 and 1 are never drawn, 18 and 19 most often; 0 and 19 are wrong."""
    wrong, classes = np.isin(np.arange(20), [0, 19]).astype(int), np.arange(20) % 4
    splits = splits_of(20, {"wrong": Known(wrong, ("no", "yes"), fault=True), "class": Known(classes, tuple("abcd"))})
    counts = np.asarray([0, 0, *[5] * 16, 12, 8])
    sequence = np.random.default_rng(0).permutation(np.repeat(np.arange(20), counts)).reshape(-1, 4)
    found = save_frequencies(tmp_path, sequence, splits)
    kept = resolve.read_file(tmp_path / "frequencies.json")
    assert kept["draws"] == 100
    assert kept["rows"]["never_drawn"] == pytest.approx(0.1)
    assert (kept["rows"]["least"], kept["rows"]["most"]) == (0, 12)
    assert kept["rows"]["most_deviation"] == pytest.approx(12 / 5 - 1)
    assert found == {
        "wrong_often": 0.5, "wrong_rarely": 0.5, "spread": pytest.approx(counts.var() / 5), "share/wrong": pytest.approx(0.08),
    }  # fmt: skip
    assert kept["wrong"]["all"] == pytest.approx(0.1)
    assert kept["wrong"]["drawn"] == pytest.approx(0.08)
    assert list(kept["classes"]["counts"].values()) == np.bincount(classes, counts, minlength=4).tolist()
    assert "<svg" in (tmp_path / "frequencies.svg").read_text()


def test_chance_is_no_preference(tmp_path: Path) -> None:
    """Uniform draws with replacement spread as much as the counts beside them; whole epochs do not spread."""
    wrong = (np.arange(200) % 5 == 0).astype(int)
    splits = splits_of(200, {"wrong": Known(wrong, ("no", "yes"), fault=True)})
    by_chance = save_frequencies(tmp_path, np.random.default_rng(1).integers(0, 200, (1000, 40)), splits)
    assert by_chance["spread"] == pytest.approx(1, abs=0.5)
    assert resolve.read_file(tmp_path / "frequencies.json")["rows_by_chance"]["spread"] == pytest.approx(1, abs=0.5)
    epochs = save_frequencies(tmp_path, np.arange(800).reshape(-1, 4) % 200, splits)
    assert epochs["spread"] == 0
    assert epochs["wrong_often"] == epochs["wrong_rarely"] == wrong.mean()
