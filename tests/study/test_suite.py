"""Comparisons over sets, seeds, budgets and settings: tables, search, equal seconds, divergence, fine-tuning."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linear_task import TASK as LINEAR
from study_calls import call, changed, fails, metrics, result, rows, runs

from bilevel.study import budget, comparison, fitting, resolve, results, search, set_tables, sets, suite
from bilevel.study.config import Config
from bilevel.study.context import Context, begun
from bilevel.study.fitting import FOLDER, NAME, PATIENCE
from bilevel.study.methods.plain import FRACTIONS, mixed_rows
from bilevel.study.registry import METHODS
from bilevel.study.run import Run
from bilevel.study.task import Measure
from bilevel.training import Checkpoints, TrainingDiverged
from bilevel.training.best import KeepBest
from bilevel.training.fit import BEST
from bilevel.training.random_search import Among, Log
from bilevel.training.settings import read_file
from bilevel.types import UserError

pytestmark = pytest.mark.usefixtures("one_device")
BOTH = ("--specific-sets", "first", "second")


def config_of(folder: Path, **study: Any) -> Config:
    return resolve.complete(resolve.default_config(LINEAR).with_study(run_dir=folder, **study))


def tables(folder: Path) -> list[tuple[str, str, str]]:
    found = json.loads((folder / "tables.json").read_text())
    return [(row["budget"], row["specific_set"], row["method"]) for row in found]


@pytest.mark.slow
def test_sets_seconds_and_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything at once; the second start trains nothing."""
    given = (*BOTH, "--same-seconds", "--budget-seconds", 0.05, "--trials", 2, "--trial-steps", 2)
    call(tmp_path, "uniform,mixing", *given)
    for name in ("first", "second"):
        found = json.loads((tmp_path / name / "search" / "mixing" / search.NAME).read_text())
        assert len(found["trials"]) == 2
        assert found["best"] == min(found["trials"], key=lambda trial: trial["valid_loss"])
        used = read_file(tmp_path / name / "mixing-seed0" / "config.yaml")
        wanted = found["best"]["settings"]
        assert used["optimizer"]["learning_rate"] == wanted.get("learning_rate", 0.05)
        assert used["mixing"]["fraction"] == wanted.get("fraction", None)
        plan = json.loads((tmp_path / name / "0.05_seconds" / budget.NAME).read_text())
        assert plan["seconds"] == 0.05
        for method, steps in plan["steps"].items():
            each = result(tmp_path / name, method)["seconds"] / 8
            assert steps == int(0.05 / each)
    found = json.loads((tmp_path / "tables.json").read_text())
    assert tables(tmp_path)[:2] == [("steps", "first", "uniform"), ("steps", "first", "mixing")]
    assert len(found) == 8
    with open(tmp_path / "tables.csv") as file:
        for line in csv.DictReader(file):
            key = (line["budget"], line["specific_set"], line["method"])
            own = [row["test_loss"] for row, of in zip(found, tables(tmp_path), strict=True) if of == key]
            assert math.isclose(float(line["mean"]), float(np.mean(own)))
    assert (tmp_path / set_tables.MARKDOWN).read_text().strip() in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(written) >= 12
    call(tmp_path, "uniform,mixing", *given)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}


def test_commands_for_one_method_each_fill_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(tmp_path, "uniform", "--same-seconds", "--budget-seconds", 0.05)  # its folders are those of no set
    for method in ("uniform", "spcl"):
        call(tmp_path, method, *BOTH, "--finetune.steps", 5)
    assert tables(tmp_path) == [("steps", name, m) for name in ("first", "second") for m in ("spcl", "uniform")]
    assert ", fine-tune |" in (tmp_path / "tables.md").read_text()
    assert "| uniform | 1 | " in (tmp_path / "second" / "comparison.md").read_text()
    capsys.readouterr()
    call(tmp_path, "spcl", *BOTH, "--eval-only", "--finetune.steps", 5)
    assert capsys.readouterr().out.count("test loss, fine-tuned |") == 2
    call(tmp_path / "first", "mixing", "--mixing.fraction", 0.5, "--steps", 6)
    assert runs(tmp_path / "first") == [("mixing", 0)], "the others have more steps"
    third = changed(tmp_path, 'DOMAINS = ("first", "second", "noise")', 'DOMAINS = ("first", "third", "noise")')
    call(tmp_path, "uniform", "--specific-sets", "third", task=third)
    assert {name for _, name, _ in tables(tmp_path)} == {"third", "second"}
    said = capsys.readouterr().err
    assert f"{tmp_path / 'first'} is left out of the tables: its runs differ in steps." in said
    assert "second is left out" not in said, "it is not opened again"


def test_the_first_set_has_a_table_when_the_second_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_set = suite.one_set

    def stops(name: str, *arguments: Any) -> Any:
        if name == "second":
            raise KeyboardInterrupt
        return one_set(name, *arguments)

    monkeypatch.setattr(suite, "one_set", stops)
    with pytest.raises(SystemExit) as stop:
        call(tmp_path, "uniform,spcl", *BOTH)
    assert stop.value.code == 130
    assert "first, pre-train" in (tmp_path / "tables.md").read_text()


def test_runs_on_other_data_and_of_other_settings_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    call(folder, "mixing", "--mixing.fraction", 0.25)
    call(folder, "mixing,uniform", "--seed", 1, "--mixing.fraction", 0.75)
    assert runs(folder) == [("mixing", 1), ("uniform", 1)]
    assert (
        "mixing-seed0 is left out of the tables: its settings differ from those of other seeds (fraction is 0.25, not 0.75)"
        in capsys.readouterr().err
    )
    call(folder, "uniform", "--seed", 2)
    assert sorted(runs(folder)) == [("mixing", 1), ("uniform", 1), ("uniform", 2)], "the latest run of mixing counts"
    call(folder, "mixing", "--seed", 3, "--mixing.fraction", 0.25)
    assert [run for run in runs(folder) if run[0] == "mixing"] == [("mixing", 3), ("mixing", 0)]
    other = changed(tmp_path, "train=rows(mixed, 0,", "train=rows(mixed, 5,")
    capsys.readouterr()
    call(folder, "spcl", task=other)
    assert runs(folder) == [("spcl", 0)]
    line = f"{folder / 'uniform-seed1'} is left out of the tables: it was trained on other train data."
    assert capsys.readouterr().err.count(line) == 1


def test_the_fraction_of_mixing_is_chosen_on_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And later seeds take what was found."""
    call(tmp_path, "mixing", "--batch-size", 8)
    found = json.loads((tmp_path / "search" / "mixing_fraction" / search.NAME).read_text())
    assert [trial["settings"]["fraction"] for trial in found["trials"]] == list(FRACTIONS)
    best = min(found["trials"], key=lambda trial: trial["valid_loss"])["settings"]
    used = read_file(tmp_path / "mixing-seed0" / "config.yaml")
    assert used["mixing"]["fraction"] == best["fraction"]
    call(tmp_path, "mixing", "--batch-size", 8, "--seed", 1)
    assert runs(tmp_path) == [("mixing", 1), ("mixing", 0)]
    assert not list((tmp_path / "search").glob("**/mixing-seed1"))
    capsys.readouterr()
    call(tmp_path, "mixing", "--batch-size", 8, "--eval-only")
    assert f"{result(tmp_path, 'mixing')['test_loss']:.3f}" in capsys.readouterr().out


def test_one_row_of_each_kind_at_least_is_tried(tmp_path: Path) -> None:
    setting = suite.opened(config_of(tmp_path), LINEAR)
    for size, fractions in ((16, FRACTIONS), (2, (0.5,))):
        found = search.trials(setting.of(config_of(tmp_path, batch_size=size)), "mixing")
        assert [trial.context.config.methods["mixing"].fraction for trial in found] == list(fractions)
    assert search.trials(setting, "uniform") == []
    given = dataclasses.replace(setting.config.methods["mixing"], fraction=0.5)
    assert search.trials(setting.of(setting.config.with_method("mixing", given)), "mixing") == []


def test_mixed_rows_are_divided_among_processes() -> None:
    assert [mixed_rows(0.1, 16, count) for count in (1, 2, 4, 8)] == [2, 2, 4, 8]
    assert [mixed_rows(fraction, 4, 2) for fraction in (0.01, 0.5, 0.99)] == [2, 2, 2]
    assert mixed_rows(0.6, 16, 4) == 12
    with pytest.raises(UserError, match=r"--mixing\.fraction 0\.1 of --batch-size 2: .* two rows a process"):
        mixed_rows(0.1, 2, 2)


def test_trials_are_draws_of_seed_method_and_number() -> None:
    config = resolve.default_config(LINEAR)
    for method, spec in METHODS.items():
        assert search.trial_settings(method, 0, 0) == {}
        if not spec.search:
            continue
        first, same = (search.trial_settings(method, 0, 1) for _ in range(2))
        assert first == same
        draws = [search.trial_settings(method, 0, i) for i in range(1, 30)]
        assert len({json.dumps(draw) for draw in draws}) > 20
        for draw in draws:
            search.with_settings(config, method, draw)
            for name, value in draw.items():
                space = spec.search[name]
                inside = space.low <= value <= space.high if isinstance(space, Log) else value in space.values
                assert inside
    assert not METHODS["replayed"].search


def test_trials_go_through_each_list_before_they_repeat() -> None:
    for method, name in (("mixing", "fraction"), ("contrastive", "fraction")):
        space = METHODS[method].search[name]
        assert isinstance(space, Among)
        for seed in range(3):
            tried = [search.trial_settings(method, seed, i + 1)[name] for i in range(2 * len(space.values))]
            assert sorted(tried[: len(space.values)]) == sorted(tried[len(space.values) :]) == sorted(space.values)
    sizes = [search.trial_settings("learning_to_reweight", 0, i, 103)["specific_batch_size"] for i in (1, 2, 3)]
    assert sorted(sizes) == [16, 64, 103]


def row(method: str, seconds: float, before: float = 0.0, seed: int = 0) -> dict[str, Any]:
    return {"method": method, "seed": seed, "seconds": seconds, "preparation_seconds": before}


def test_steps_that_fit_in_the_seconds(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=100)
    found = [row("uniform", 10.0), row("uniform", 12.0), row("soba", 22.0), row("classifier", 16.0, 5.0)]
    plan = budget.plan(config, found)
    assert plan["seconds"] == 11.0
    assert plan["steps"] == {"uniform": 100, "soba": 50, "classifier": 54}  # (11 - 5) / 0.11
    assert budget.plan(config, [row("uniform", 99.0), *found[1:]]) == plan, "decided once"
    more = budget.plan(config, [row("penalty", 11.0)])
    assert (more["seconds"], more["steps"]) == (11.0, plan["steps"] | {"penalty": 100})
    other = config.with_study(budget_seconds=5.5)
    assert budget.plan(other, found) == {"seconds": 5.5, "steps": {"uniform": 50, "soba": 25, "classifier": 4}}
    assert budget.plan(config, found) == more, "each budget has a folder"
    assert set(budget.planned(dict.fromkeys(plan["steps"], config), plan)) == {"soba", "classifier"}
    assert budget.plan(config_of(tmp_path / "new"), [row("soba", 1.0)]) == {"seconds": 0.0, "steps": {}}


def test_a_method_of_which_no_step_fits_has_a_row(tmp_path: Path) -> None:
    call(tmp_path, "uniform,spcl", "--same-seconds", "--budget-seconds", 1e-9)
    text = (tmp_path / "tables.md").read_text()
    seconds = text[text.index("same budget of seconds") :]
    assert "| uniform | – | – |" in seconds
    assert "| spcl | – | – |" in seconds


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs, of which those of mixing diverge."""
    tried: list[str] = []
    original = results.run

    def run(context: Context) -> dict[str, Any]:
        tried.append(f"{context.study.run_dir.name}/{context.directory.name}")
        if context.method == "mixing":
            Run(context).prepare()
            raise TrainingDiverged("The generic loss is nan at step 3: lower the learning rate.", 3)
        return original(context)

    monkeypatch.setattr(results, "run", run)
    return tried


def test_a_comparison_goes_on_without_a_run_that_diverged(
    tmp_path: Path, diverging: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, given = tmp_path / "run", ("--mixing.fraction", 0.5)
    fails(run, "mixing,uniform", *given)
    file = run / "mixing-seed0" / results.NAME
    note = json.loads(file.read_text())
    assert (note["step"], note["message"]) == (3, "The generic loss is nan at step 3: lower the learning rate.")
    error = capsys.readouterr().err
    assert f"error: 1 of the runs diverged and are dashes in the tables ({file.parent})" in error
    assert f"Delete {file} to train it again." in error
    assert "| mixing | 0 of 1 | – |" in (run / "comparison.md").read_text()
    assert "| mixing | – | – |" in (run / "tables.md").read_text()
    assert (run / "report.html").exists()
    fails(run, "mixing,uniform", *given, "--log-every", 6)
    assert diverging == ["run/mixing-seed0", "run/uniform-seed0", "run/uniform-seed0"]
    fails(run, "mixing", *given, "--optimizer.learning-rate", 1e-3)
    assert diverging[3:] == []
    assert "holds a run with other settings (optimizer.learning_rate was 0.05, now 0.001)" in capsys.readouterr().err


def test_trials_that_diverged_are_not_run_again(tmp_path: Path, diverging: list[str]) -> None:
    for _ in range(2):
        fails(tmp_path, "mixing,uniform", "--trials", 1, "--trial-steps", 2)
    assert [name for name in diverging if "mixing" in name] == ["0/mixing-seed0"]
    assert "| mixing | – | – |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "search" / "uniform" / search.NAME).exists()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fitting, "EVALUATE_EVERY", 5)
    return 5


def tuned(folder: Path, method: str = "uniform") -> dict[str, float]:
    return json.loads((folder / f"{method}-seed0" / NAME).read_text())["results"]


def evaluated(folder: Path) -> list[int]:
    return [row["step"] for row in metrics(folder / "uniform-seed0" / FOLDER)]


TUNE = ("--finetune.steps", 40, "--finetune.learning-rate", 0.05)


def test_fine_tuning_later_and_after_it_broke_off(tmp_path: Path, often: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains nothing again, and ends as if it had been asked for at once; other flags start over."""
    call(tmp_path / "whole", "uniform", *TUNE)
    call(tmp_path / "cut", "uniform")
    folder = tmp_path / "cut" / "uniform-seed0"
    before = (folder / "metrics.jsonl").read_bytes(), (folder / "result.json").read_bytes()
    compare, seen = KeepBest.compare, []

    def breaks(self: Any, state: Any) -> dict[str, float]:
        seen.append(int(state.step))
        if len(seen) == 5:
            raise RuntimeError("power failure")
        return compare(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "compare", breaks)
        with pytest.raises(RuntimeError, match="power failure"):
            call(tmp_path / "cut", "uniform", *TUNE)
        assert not (folder / NAME).exists()
        call(tmp_path / "cut", "uniform", *TUNE)
    assert seen == [5, 10, 15, 20, 25, 25, 30, 35, 40]
    assert tuned(tmp_path / "cut") == tuned(tmp_path / "whole")
    assert evaluated(tmp_path / "cut") == evaluated(tmp_path / "whole") == list(range(often, 41, often))
    assert before == ((folder / "metrics.jsonl").read_bytes(), (folder / "result.json").read_bytes())
    assert not (folder / FOLDER / "checkpoints").exists()
    steps = [int(path.name) for path in (folder / FOLDER / BEST).iterdir()]
    assert steps == [tuned(tmp_path / "cut")["finetuned_steps"]]
    assert rows(tmp_path / "cut")[0]["finetuned_valid_loss"] < rows(tmp_path / "cut")[0]["valid_loss"]
    found = [tuned(tmp_path / "cut")]
    for rate in (1e-3, 0.05):
        call(tmp_path / "cut", "uniform", *TUNE[:-1], rate)
        found.append(tuned(tmp_path / "cut"))
        with Checkpoints(folder / FOLDER / BEST) as kept:
            assert kept.latest_step() == found[-1]["finetuned_steps"]
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("higher", [False, True])
def test_fine_tuning_ends_when_nothing_improved_for_long(
    tmp_path: Path, often: int, higher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From good parameters by huge steps; with a measure that is better when lower, and with one when higher."""
    task = changed(tmp_path, "squared", "squared")
    if higher:
        text = task.read_text().replace('3, "squared units"', '3, "squared units", lower_is_better=False')
        task.write_text(text.replace('"loss": ((losses', '"loss": ((-losses'))
    given = ("--finetune.steps", 1000, "--finetune.learning-rate", 20.0)
    monkeypatch.setattr(fitting, "remove_folder", lambda folder: None)  # as if killed before it, and before the result
    folder = tmp_path / "run"
    call(folder, "uniform", *given, task=task)
    found, steps = tuned(folder), evaluated(folder)
    assert steps[-1] == found["finetuned_steps"] + PATIENCE * often < 1000
    sign = -1 if higher else 1
    assert sign * found["finetuned_valid_loss"] <= sign * result(folder, "uniform")["valid_loss"]
    (folder / "uniform-seed0" / NAME).unlink()
    call(folder, "uniform", *given, task=task)
    assert tuned(folder) == found
    assert evaluated(folder) == steps


def test_fine_tuning_that_diverged_keeps_the_losses_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--finetune.steps", 60, "--finetune.learning-rate")
    fails(tmp_path, "uniform,spcl", *given, 1e38)
    folder = tmp_path / "uniform-seed0" / FOLDER
    assert (folder / results.NAME).exists()
    assert "| uniform | 1 | " in (tmp_path / "comparison.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(results, "run", None)
        fails(tmp_path, "uniform,spcl", *given, 1e38)
    call(tmp_path, "uniform,spcl", *given, 1e-3)
    assert not (folder / results.NAME).exists()
    assert ", fine-tune |" in (tmp_path / "tables.md").read_text()


LOSS = Measure("loss", "loss", 3, "nats")


def test_ranks(tmp_path: Path) -> None:
    def row(name: str, method: str, loss: float, tuned: float | None = None) -> dict[str, Any]:
        return {
            "specific_set": name,
            "budget": "steps",
            "method": method,
            "test_loss": loss,
            "finetuned_test_loss": tuned,
        }

    found = [
        row("a", "uniform", 2.0, 1.0), row("a", "uniform", 2.2, 1.2), row("a", "soba", 1.0, 1.2),
        row("b", "uniform", 3.0, 2.0), row("b", "soba", 4.0, 3.0),
    ]  # fmt: skip
    cells = set_tables.ranked(found, LOSS)
    cell = cells.loc["steps", "a", "uniform", "pre-train"]
    assert (cell["mean"], cell["rank"], cell["seeds"]) == (pytest.approx(2.1), 2, 2)
    assert cell["std"] == pytest.approx(0.2 / math.sqrt(2))
    assert cells.loc[("steps", "a", "soba", "fine-tune"), "rank"] == 2
    text = set_tables.write_tables(tmp_path, found, LOSS)
    assert "Test loss in nats, the same budget of steps for every method:" in text
    assert "| uniform | 2.100 ± 0.141 ② | 1.100 ± 0.141 ① | 3.000 ① | 2.000 ① | 1.5 | 1.0 |" in text
    assert "| soba | 1.000 (1 seed) ① | 1.200 (1 seed) ② | 4.000 ② | 3.000 ② | 1.5 | 2.0 |" in text
    lost = [{"specific_set": "a", "budget": "steps", "method": method} for method in ("soba", "dds")]
    text = set_tables.write_tables(tmp_path, found + lost, LOSS)
    assert "| soba | 1.000 (1 of 2 seeds) ① | 1.200 (1 of 2 seeds) ② | 4.000 ② |" in text
    assert "| dds | – | – | – | – | – | – |" in text
    higher = set_tables.ranked(found, LOSS._replace(lower_is_better=False))
    assert higher.loc[("steps", "a", "uniform", "pre-train"), "rank"] == 1


@pytest.mark.usefixtures("with_pictures")
def test_the_plot_of_the_tables(tmp_path: Path) -> None:
    found = [{"specific_set": "a", "budget": "steps", "method": m, "test_loss": 1.0} for m in ("uniform", "soba")]
    set_tables.write_tables(tmp_path, found, LOSS)
    assert "<svg" in (tmp_path / "tables.svg").read_text()


def test_the_report_tells_methods_apart(tmp_path: Path) -> None:
    for method, rate in (("uniform", 0.5), ("soba", 0.25)):
        (tmp_path / method).mkdir()
        (tmp_path / method / "metrics.jsonl").write_text("{}\n")
        text = f"format: 1\nmethod: {method}\nseed: 0\nsteps: 8\noptimizer: {{learning_rate: {rate}}}\n"
        (tmp_path / method / "config.yaml").write_text(text + ("soba: {tracker: adam}\n" if method == "soba" else ""))
    found = comparison._settings({method: tmp_path / method for method in ("uniform", "soba")})
    assert {line[0]: line[1] for line in found.lines} == {
        "steps": "8", "uniform: optimizer.learning_rate": "0.5", "soba: optimizer.learning_rate": "0.25",
        "soba: soba.tracker": "adam",
    }  # fmt: skip


def test_names_of_sets_and_runs(tmp_path: Path) -> None:
    names = [sets.set_name(x) for x in ("a/rct.txt.gz", "b/kjv/", "tfds:x:y", "*.txt")]
    assert names == ["rct", "kjv", "tfds_x_y", "_"]
    with pytest.raises(UserError, match='--specific-sets has two sets named "a"'):
        sets.named_sets(config_of(tmp_path, specific_sets=("x/a", "y/a.txt")))
    (one,) = sets.named_sets(config_of(tmp_path, specific_sets=("x/a",)))
    assert one[0] == "a"
    assert (one[1].study.run_dir, one[1].prepared) == (tmp_path / "a", tmp_path / "a" / "prepared")
    for name in ("warm_soba-seed12", "soba-seedling", "uniform-seed3"):
        (tmp_path / name).mkdir()
        if name != "uniform-seed3":
            (tmp_path / name / "config.yaml").write_text("{}")
    assert begun(tmp_path) == [("warm_soba", 12)]
