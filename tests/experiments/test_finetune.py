"""Fine-tuning: when it ends, how it continues, and on several devices and processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from experiments.language_modeling.finetune import BEST, FOLDER, NAME, PATIENCE
from language_toy import call, call_together, flags, one_device_each, write_texts

from bilevel.files import load_tree
from bilevel.training import Checkpoints
from experiments.language_modeling import finetune

EVERY = 5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "EVALUATE_EVERY", EVERY)


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / NAME).read_text())["results"]


def evaluated(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / FOLDER / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_phase_that_broke_off_continues(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"method": "uniform", "finetune_steps": 40}
    call(data, **given, run_dir=data / "whole")
    whole, cut = data / "whole" / "uniform-seed0", data / "run" / "uniform-seed0"
    compare, seen = finetune._Best.compare, []

    def breaks(self: finetune._Best, state: object) -> dict[str, float]:
        seen.append(int(state.step))  # pyright: ignore[reportAttributeAccessIssue]
        if len(seen) == 5:
            raise RuntimeError("power failure")
        return compare(self, state)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(finetune._Best, "compare", breaks)
    with pytest.raises(RuntimeError, match="power failure"):
        call(data, **given)
    assert not (cut / NAME).exists()
    call(data, **given)
    assert seen == [5, 10, 15, 20, 25, 25, 30, 35, 40]
    assert results(cut) == results(whole)
    assert evaluated(cut) == evaluated(whole) == list(range(EVERY, 41, EVERY))
    assert not (cut / FOLDER / "checkpoints").exists()
    steps = [int(path.name) for path in (cut / FOLDER / BEST).iterdir()]
    assert steps == [results(cut)["finetuned_steps"]]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_it_ends_when_the_loss_has_not_fallen_for_long(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"method": "uniform", "finetune_steps": 1000, "finetune_learning_rate": 20.0}
    monkeypatch.setattr(finetune, "remove", lambda folder: None)  # as if killed before it, and before the result
    call(data, **given)
    folder = data / "run" / "uniform-seed0"
    found, steps = results(folder), evaluated(folder)
    assert steps[-1] == found["finetuned_steps"] + PATIENCE * EVERY < 1000
    before = json.loads((folder / "result.json").read_text())
    assert found["finetuned_specific_valid_loss"] <= before["specific_valid_loss"]
    kept = [path.name for path in (folder / FOLDER / BEST).iterdir()]
    assert kept == [str(found["finetuned_steps"])], "also where no step was better than none"
    (folder / NAME).unlink()
    call(data, **given)
    assert results(folder) == found
    assert evaluated(folder) == steps


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_other_flags_start_over(data: Path) -> None:
    found, folder = [], data / "run" / "uniform-seed0"
    for rate in (1e-3, 1e-2, 1e-3):
        call(data, method="uniform", finetune_steps=20, finetune_learning_rate=rate)
        found.append(results(folder))
        with Checkpoints(folder / FOLDER / BEST) as kept:
            assert kept.latest_step() == found[-1]["finetuned_steps"]
    assert found[0] == found[2] != found[1]


@pytest.mark.slow
def test_a_state_split_over_devices_ends_alike(data: Path) -> None:
    given = {"method": "uniform", "finetune_steps": 10, "batch_size": 8, "big_batch_size": 16}
    call(data, **given)
    call(data, "--shard-state", **given, run_dir=data / "split")
    found = [results(data / name / "uniform-seed0") for name in ("run", "split")]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["warm_soba", "contrastive"])
def test_two_processes_give_what_one_gives(data: Path, method: str) -> None:
    """The command of every host; training, what precedes it, fine-tuning and the tables."""
    given = {
        "method": method, "finetune_steps": 100, "weights__contrastive_rows": 40, "weights__contrastive_finetune_steps": 100,
        "weights__specific_batch_size": 8, "weights__classifier_steps": 10,
    }  # fmt: skip
    call_together(*flags(data, **given, run_dir=data / "together"))
    alone = [sys.executable, "-m", "experiments.language_modeling", *flags(data, **given, run_dir=data / "alone")]
    subprocess.run(alone, env=one_device_each(), check=True)
    name = f"{method}-seed0"
    one, two = (json.loads((data / where / name / "result.json").read_text()) for where in ("alone", "together"))
    assert two["specific_test_loss"] == pytest.approx(one["specific_test_loss"], rel=1e-3)
    one, two = (results(data / where / name) for where in ("alone", "together"))
    assert one["finetuned_steps"] > 0
    assert two["finetuned_specific_test_loss"] == pytest.approx(one["finetuned_specific_test_loss"], rel=1e-3)
    shutil.rmtree(data / "together" / name / "checkpoints")
    if method == "contrastive":
        files = [data / where / name / "contrastive_scores.safetensors" for where in ("alone", "together")]
        alone, together = (load_tree(file)[0]["losses"] for file in files)
        np.testing.assert_allclose(together, alone, atol=2e-3)
