"""Comparisons in which runs diverge, come from several commands, or are refused, at tiny sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from language_toy import call, call_together, flags, write_texts

from bilevel.training import TrainingDiverged
from experiments.language_modeling import diverged, finetune, search, suite

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs, of which those of mixing diverge."""
    tried: list[str] = []

    def run(config: Config, method: str, seed: int, corpora: Corpora, *more: Any) -> dict[str, Any]:
        folder = config.run_dir / f"{method}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        tried.append(f"{folder.parent.name}/{folder.name}")
        if method == "mixing":
            raise TrainingDiverged("The generic loss is nan at step 3: lower the learning rate.", 3)
        return original(config, method, seed, corpora, *more)

    original: Callable[..., dict[str, Any]] = diverged.run
    monkeypatch.setattr(diverged, "run", run)
    return tried


def fails(data: Path, *more: str, **given: object) -> None:
    with pytest.raises(SystemExit) as stop:
        call(data, *more, **given)
    assert stop.value.code == 2


def test_a_comparison_goes_on_without_a_run_that_diverged(
    data: Path, diverging: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(data, compare="mixing,uniform")
    run = data / "run"
    file = run / "mixing-seed0" / diverged.NAME
    note = json.loads(file.read_text())
    assert (note["step"], note["message"]) == (3, "The generic loss is nan at step 3: lower the learning rate.")
    error = capsys.readouterr().err
    assert f"error: 1 of the runs diverged and are dashes in the tables ({file.parent})" in error
    assert f"Delete {file} to train it again." in error
    assert "| mixing | 0 of 1 | – |" in (run / "comparison.md").read_text()
    assert "| mixing | – | – |" in (run / "tables.md").read_text()
    assert "uniform" in (run / "report.html").read_text()
    fails(data, compare="mixing,uniform", log_every=6)
    assert diverging == ["run/mixing-seed0", "run/uniform-seed0", "run/uniform-seed0"]
    fails(data, method="mixing", learning_rate=1e-3)
    assert diverging[3:] == ["run/mixing-seed0"]
    assert not file.exists(), "it was of other settings"


@pytest.mark.slow
def test_trials_that_diverged_are_not_run_again(data: Path, diverging: list[str]) -> None:
    for _ in range(2):
        fails(data, compare="mixing,uniform", trials=1, trial_steps=4)
    assert [name for name in diverging if "mixing" in name] == ["0/mixing-seed0"]
    assert "| mixing | – | – |" in (data / "run" / "tables.md").read_text()
    assert (data / "run" / "search" / "uniform" / search.NAME).exists()


@pytest.mark.slow
def test_fine_tuning_that_diverged_keeps_the_losses_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"compare": "uniform,mixing", "finetune_steps": 20, "finetune_learning_rate": 1e38}
    fails(data, **given)
    folder = data / "run" / "uniform-seed0" / finetune.FOLDER
    assert (folder / diverged.NAME).exists()
    assert "| uniform | 1 | " in (data / "run" / "comparison.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(diverged, "run", None)
        fails(data, **given)
    call(data, **(given | {"finetune_learning_rate": 1e-3}))
    assert not (folder / diverged.NAME).exists()
    assert ", fine-tune |" in (data / "run" / "tables.md").read_text()


@pytest.mark.slow
def test_commands_for_one_method_each_fill_one_table(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "specific", data / "second")
    sets = ["--specific-sets", str(data / "specific"), str(data / "second")]
    for method in ("uniform", "mixing"):
        call(data, *sets, method=method, finetune_steps=20)
    run = data / "run"
    rows = json.loads((run / "tables.json").read_text())
    assert [(row["specific_set"], row["method"]) for row in rows] == [
        (name, method) for name in ("specific", "second") for method in ("mixing", "uniform")
    ]
    assert all("finetuned_specific_test_loss" in row for row in rows)
    assert (run / "tables.md").read_text().count(" ② ") >= 4
    assert "| uniform | 1 | " in (run / "second" / "comparison.md").read_text()
    assert "uniform" in (run / "second" / "report.html").read_text()
    capsys.readouterr()
    call(data, *sets, "--eval-only", method="mixing", finetune_steps=20)
    assert capsys.readouterr().out.count("test loss, fine-tuned |") == 2
    call(data, method="soba", steps=6, run_dir=run / "specific")
    other = json.loads((run / "specific" / "comparison.json").read_text())
    assert [row["method"] for row in other] == ["soba"], "the others have more steps"


@pytest.mark.slow
def test_the_first_set_has_a_table_when_the_second_is_stopped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data / "specific", data / "second")
    one_set = suite._one_set

    def stops(name: str, *arguments: Any) -> Any:
        if name == "second":
            raise KeyboardInterrupt
        return one_set(name, *arguments)

    monkeypatch.setattr(suite, "_one_set", stops)
    with pytest.raises(SystemExit):
        call(data, "--specific-sets", str(data / "specific"), str(data / "second"), compare="uniform,mixing")
    assert "specific, pre-train" in (data / "run" / "tables.md").read_text()


@pytest.mark.slow
def test_a_method_of_which_no_step_fits_has_a_row(data: Path) -> None:
    call(data, "--same-seconds", compare="uniform,mixing", budget_seconds=1e-9)
    text = (data / "run" / "tables.md").read_text()
    seconds = text[text.index("same budget of seconds") :]
    assert "| uniform | – | – |" in seconds
    assert "| mixing | – | – |" in seconds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compare": "uniform,mixing", "weights__mixing_fraction": 1.5}, "--weights.mixing-fraction 1.5"),
        ({"compare": "uniform,contrastive", "weights__contrastive_start": 0.01}, "--weights.contrastive-start 0.01"),
        ({"compare": "uniform,soba", "weights__specific_candidates": 16}, "--weights.specific-candidates 16"),
        ({"compare": "uniform,frozen"}, "--weights.frozen-from"),
        ({"compare": "uniform,soba", "SMALL": True}, "A batch of 4 rows cannot be drawn from"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    data: Path, given: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "specific", data / "small")
    if given.pop("SMALL", False):
        (data / "small" / "train.txt").write_text("SHORT\n")
    fails(data, "--specific-sets", str(data / "specific"), str(data / "small"), **given)
    assert words in capsys.readouterr().err
    assert not (data / "run").exists()


@pytest.mark.slow
def test_two_processes_agree_on_the_steps_that_fit(data: Path) -> None:
    """Each measures seconds of its own; the steps are those of process 0."""
    given = {
        "compare": "uniform,mixing", "steps": 40, "trials": 2, "trial_steps": 4, "batch_size": 32, "big_batch_size": 32,
        "weights__mixing_fraction": 0.25,
    }  # fmt: skip
    call_together(*flags(data, **given), "--same-seconds")
    run = data / "run"
    plan = json.loads((run / suite.SAME_SECONDS / suite.PLAN).read_text())
    assert plan["steps"]["uniform"] == 40
    rows = json.loads((run / "tables.json").read_text())
    assert len(rows) == 4
    assert rows[3]["steps"] == plan["steps"]["mixing"]
