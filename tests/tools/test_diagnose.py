"""The check before a long run, as a user calls it, at tiny sizes."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_task
import numpy as np
import pytest

from bilevel.cli import main
from bilevel.study.resolve import default_config
from bilevel.study.suite import opened
from bilevel.tools.diagnose.measure import Compared, Measurement, table

Call = Callable[..., None]
SIZES = {"rows": 16, "pairs": 3, "batch_rows": 8}


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "diagnose.json").read_text())


def test_training_writes_what_it_promises(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("diagnose", steps=20, evaluate_every=8, **SIZES)
    result = found(tmp_path / "run")
    rows = result["measurements"]
    assert [row["step"] for row in rows] == [8, 16, 20]
    for row in rows:
        assert row["sar"] > 0.6  # a third of a generic batch is like the specific rows, and a third is their opposite
        assert 0 <= row["sar_error"] < 0.2
        assert row["valid_loss/generic"] > 0
    assert "SAR is above chance" in result["verdict"]
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "diagnose.md").read_text()
    shown = table(rows, linear_task.TASK.measures[0])
    for text in (shown, result["verdict"], "16 specific and 16 generic rows, 3 pairs of batches of 8 other rows"):
        assert text in printed
        assert text in page
    assert shown.startswith("| step | valid loss | generic valid loss | SAR | GAR |")
    assert shown.splitlines()[-1].startswith("| 20 |")
    assert ElementTree.parse(tmp_path / "run" / "diagnose.svg").getroot().tag.endswith("svg")


def test_a_checkpoint_gives_what_training_gave(call: Call, tmp_path: Path) -> None:
    """The same flags make the same run; its checkpoint knows model and data, and other data may be measured on it."""
    call("diagnose", steps=8, schedule_steps=8, model__network="affine", **SIZES)
    last = found(tmp_path / "run")["measurements"][-1]
    call("compare", compare="uniform", steps=8, model__network="affine", schedule_steps=8)
    run = tmp_path / "run" / "uniform-seed0"
    call("diagnose", checkpoint=run, run_dir="again", **SIZES)
    (restored,) = found(tmp_path / "again")["measurements"]
    assert restored.keys() == last.keys()
    for name, value in last.items():
        assert restored[name] == pytest.approx(value, rel=1e-5), name
    call("diagnose", checkpoint=run, run_dir="other", data__specific="second", **SIZES)
    assert found(tmp_path / "other")["settings"]["data"]["specific"] == "second"
    assert found(tmp_path / "other")["measurements"][0]["valid_loss"] != last["valid_loss"]


def test_gradients_of_a_part_are_those_of_a_model_whose_rest_is_constant(call: Call, tmp_path: Path) -> None:
    """A pattern that fits all parameters changes nothing; the bias alone has other rates."""
    for name, part in (("all", None), ("every", "*"), ("bias", "b")):
        given = {} if part is None else {"part": part}
        call("diagnose", steps=8, evaluate_every=8, model__network="affine", run_dir=name, **SIZES, **given)
    rates = {name: found(tmp_path / name)["measurements"][-1]["sar"] for name in ("all", "every", "bias")}
    assert rates["every"] == rates["all"] != rates["bias"]
    assert "Gradients of the parameters b." in found(tmp_path / "bias")["measured"]


def test_rows_of_one_kind_give_rates_of_chance() -> None:
    class Same(linear_task.LinearTask):
        def open(self, config: Any, folder: Any) -> Any:
            splits = super().open(config, folder)
            rows = linear_task.rows(np.zeros(400, int), 7, "same")
            valid = {"specific": rows, "generic": linear_task.rows(np.zeros(400, int), 8, "other")}
            return splits.__class__(train=rows, specific=rows, valid=valid, test=valid)

    setting = opened(default_config(Same()), Same())
    row = Measurement(setting, Compared(100, 8, 16), 0)(({"w": np.full(4, 0.2, np.float32)}, {}))
    for name in ("sar", "gar"):
        assert abs(row[name] - 0.5) < 4 * row[f"{name}_error"]


def test_compared_rows_are_in_no_batch() -> None:
    """Where the specific set decides, and generic rows are trained on, as in classification."""

    class Deciding(linear_task.LinearTask):
        def open(self, config: Any, folder: Any) -> Any:
            splits = super().open(config, folder)
            return splits.__class__(
                train=splits.train, specific=splits.specific, valid={"specific": splits.specific}, test=splits.test
            )

    measure = Measurement(opened(default_config(Deciding()), Deciding()), Compared(400, 4), 3)
    specific, generic, specific_batches, generic_batches = measure.data
    assert "30 specific and 120 generic rows, " in measure.about
    assert "the generic rows are of the training set" in measure.about
    assert "4 pairs of batches of 15 other rows" in measure.about
    for rows, batches in ((specific, specific_batches), (generic, generic_batches)):
        assert len(np.unique(rows["id"])) == len(rows["id"])
        assert not {*rows["id"].tolist()} & {*batches["id"].ravel().tolist()}


BAD_INPUT = {
    "one row": ({"rows": 1}, ["--rows 1 must be at least 2"]),
    "one pair": ({"pairs": 1}, ["--pairs 1 must be at least 2"]),
    "no such part": ({"part": "tower/*"}, ["--part tower/* fits no parameter; their paths begin with w"]),
    "no steps": ({"steps": 0}, ["--steps 0 must be at least 1"]),
    "large batches": ({"batch_rows": 5000}, ["--batch-rows 5000: only 60 rows of first", "give at most 60"]),
    "missing data": ({"data__specific": "third"}, ["--data.specific third does not exist"]),
    "no use": ({"compare": "soba"}, ["--compare is not for bilevel diagnose"]),
    "no use either": ({"finetune__steps": 5}, ["--finetune.steps is not for bilevel diagnose"]),
    "no run": ({"checkpoint": "nowhere"}, ["--checkpoint nowhere holds no run", "METHOD-seedN"]),
    "other model": (
        {"checkpoint": "uniform-seed0", "model__network": "affine"},
        ["--model.network does not go with --checkpoint"],
    ),
    "other length": ({"checkpoint": "uniform-seed0", "steps": 16}, ["--steps does not go with --checkpoint"]),
    "no checkpoint": ({"checkpoint": "uniform-seed0"}, ["holds no checkpoint"]),
    "several sets": (
        {"checkpoint": "soba-seed0"},
        ["several specific sets (a + b): choose the one", "--data.specific"],
    ),
    "broken settings": ({"checkpoint": "dds-seed0"}, ["dds-seed0/config.yaml", "holds no settings"]),
    "unwritable directory": ({"run_dir": "file/below"}, ["Cannot write to the run directory"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(
    case: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, words = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    run = {"format": 1, "task": "linear", "method": "uniform", "seed": 0, "steps": 8}
    several = run | {"data": {"specific": "a + b"}, "variant": {"task_weights": None}}
    for name, settings in (("uniform-seed0", run), ("soba-seed0", several), ("dds-seed0", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as stop:
        call("diagnose", **given)
    assert stop.value.code == 2
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in message


@pytest.mark.slow
def test_text(texts: list[str], tmp_path: Path) -> None:
    main(["diagnose", "language_modeling", *texts, "--rows", "16", "--pairs", "2"])
    (*_, row) = found(tmp_path / "run")["measurements"]
    assert row["step"] == 4
    assert row["sar"] > 0.5


@pytest.mark.slow
def test_images(digits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["diagnose", "image_classification", *digits, "--rows", "16", "--pairs", "2", "--batch-rows", "8"])
    (*_, row) = found(tmp_path / "run")["measurements"]
    assert 0 <= row["valid_accuracy"] < 1
    assert 0 < row["sar"] < 1
    assert "the generic rows are of the training set, as there are no others." in capsys.readouterr().out
