"""Contrastive selection, and comparisons over sets, budgets and settings, at tiny sizes."""

import csv
import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.language_modeling.config import ALL, METHODS, Config, DataConfig
from experiments.language_modeling.corpora import load_corpora
from experiments.language_modeling.tables import Key
from experiments.runs import STOPPED
from language_toy import STEPS, call, write_texts

from bilevel.offline.loss_table import LossTable
from bilevel.training.run_dir import read_settings
from bilevel.types import UserError
from experiments.language_modeling import contrastive, run, search, suite, tables

SCORING = {"weights__contrastive_rows": 40, "weights__contrastive_finetune_steps": 30}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def corpora_of(data: Path):
    files = DataConfig(generic=str(data / "generic.txt"), specific=str(data / "specific"), cache_dir=data / "cache")
    return load_corpora(Config(length=16, data=files))


@pytest.mark.slow
def test_contrastive_selects_what_fine_tuning_helps(data: Path) -> None:
    more = {"weights__contrastive_fraction": 0.25, "finetune_learning_rate": 5e-3}
    call(data, method="contrastive", data__generic_labels=data / "labels.tsv", **(SCORING | more))
    folder = data / "run" / "contrastive-seed0"
    scores = contrastive.load_scores(folder / contrastive.NAME, corpora_of(data), own=False)
    assert np.isfinite(scores.losses).sum() == 40
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [row["share/<script>UPPER"] for row in metrics]
    assert [row["step"] for row in metrics][-1] == STEPS
    assert shares[-1] > 0.9, "upper-case rows, like the specific ones, are half of all rows before selection"
    result = json.loads((folder / "result.json").read_text())
    assert result["preparation_step"] == STEPS // 2
    assert result["seconds"] > result["preparation_seconds"] > 0


@pytest.mark.slow
def test_contrastive_continues_and_takes_scores(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(data, method="contrastive", **SCORING)
    folder = data / "run" / "contrastive-seed0"
    whole = json.loads((folder / "result.json").read_text())
    scores = data / "kept.npz"
    shutil.copy(folder / contrastive.NAME, scores)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / str(STEPS))

    def never(*unused: object) -> None:
        raise AssertionError("the scores are there")

    monkeypatch.setattr(contrastive, "compute_scores", never)
    call(data, method="contrastive", **SCORING)
    again = json.loads((folder / "result.json").read_text())
    assert again["specific_test_loss"] == whole["specific_test_loss"]
    call(data, method="contrastive", run_dir=data / "other", weights__contrastive_scores=scores, **SCORING)
    other = json.loads((data / "other" / "contrastive-seed0" / "result.json").read_text())
    assert other["specific_test_loss"] == whole["specific_test_loss"]


def test_other_scores_at_the_same_path_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run selects by is what it was begun with, wherever the file lies."""
    corpora, file = corpora_of(data), data / "scores.npz"
    made = {"specific_hash": corpora.specific["train"].content_hash}
    gains = np.random.default_rng(0).normal(size=len(corpora.generic)).astype(np.float32)
    LossTable(gains, corpora.generic.content_hash, made).save(file)
    call(data, method="contrastive", weights__contrastive_scores=file)
    (data / "run" / "contrastive-seed0" / "result.json").unlink()
    file.rename(data / "moved.npz")
    call(data, method="contrastive", weights__contrastive_scores=data / "moved.npz")
    LossTable(-gains, corpora.generic.content_hash, made).save(file)
    with pytest.raises(SystemExit):
        call(data, method="contrastive", weights__contrastive_scores=file)
    assert "holds a run with other settings (weights.contrastive_digest was" in capsys.readouterr().err


def test_too_few_scores_are_refused_before_training(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora, file = corpora_of(data), data / "scores.npz"
    gains = np.full(len(corpora.generic), np.nan, np.float32)
    gains[:20] = 1.0
    made = {"specific_hash": corpora.specific["train"].content_hash}
    LossTable(gains, corpora.generic.content_hash, made).save(file)
    with pytest.raises(SystemExit):
        call(data, method="contrastive", weights__contrastive_scores=file)
    assert "--weights.contrastive-fraction 0.1 of 20 scored rows keeps fewer than the" in capsys.readouterr().err
    assert not (data / "run").exists()


def test_seconds_of_scoring_leave_out_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr(contrastive, "perf_counter", lambda: next(times))
    clock = contrastive._Clock()
    clock(10, 25)
    assert clock.seconds == 0
    clock(20, 25)
    clock(25, 25)
    assert clock.seconds == pytest.approx(2 / 15 * 25)


def older_file(path: Path, content_hash: str) -> None:
    """As written before scores knew their specific data."""
    rows = np.arange(0, 40, 2)
    np.savez(path, rows=rows, gain=rows.astype(np.float32), content_hash=content_hash, seconds=2.5)


def test_scores_of_other_data_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora, file = corpora_of(data), data / "scores.npz"
    hashes = {"generic": corpora.generic.content_hash, "specific": corpora.specific["train"].content_hash}

    def refused(generic: str, specific: str) -> str:
        LossTable(np.ones(300, np.float32), generic, {"specific_hash": specific}).save(file)
        with pytest.raises(SystemExit):
            call(data, method="contrastive", weights__contrastive_scores=file)
        return capsys.readouterr().err

    assert f"content hash 0, but these data have {hashes['generic']}" in refused("0", hashes["specific"])
    assert f"for other specific data (hash 0, here {hashes['specific']})" in refused(hashes["generic"], "0")
    np.save(data / "scores.npy", np.ones(3))
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        contrastive.load_scores(data / "scores.npy", corpora, own=False)


def test_scores_of_before_are_taken(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora, file = corpora_of(data), data / "scores.npz"
    older_file(file, corpora.generic.content_hash)
    scores = contrastive.load_scores(file, corpora, own=True)
    assert scores.settings[contrastive.SECONDS] == 2.5
    assert contrastive.best_rows(scores, 0.1, corpora).positions.tolist() == [36, 38]
    assert "warning" not in capsys.readouterr().err
    contrastive.load_scores(file, corpora, own=False)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"warning: {file} does not say which specific data its scores were made for" in printed
    older_file(file, "0" * 64)
    with pytest.raises(UserError, match=r"are of other generic data \(hash 000000000000, here "):
        contrastive.load_scores(file, corpora, own=True)


def test_a_signal_at_the_end_of_a_run_keeps_the_next_from_beginning(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.while_training

    def interrupted(*given: Any) -> Any:
        evaluate = original(*given)

        def and_raise(state: Any) -> Any:
            if int(state.step) == STEPS:
                signal.raise_signal(signal.SIGINT)
            return evaluate(state)

        return and_raise

    with monkeypatch.context() as patch:
        patch.setattr(run, "while_training", interrupted)
        with pytest.raises(SystemExit) as stop:
            call(data, compare="uniform,mixing")
    assert stop.value.code == STOPPED
    assert not (data / "run" / "mixing-seed0").exists()
    call(data, compare="uniform,mixing")
    assert (data / "run" / "mixing-seed0" / "result.json").exists()


@pytest.mark.slow
def test_fine_tuning_later_trains_nothing_again(data: Path) -> None:
    call(data, method="uniform")
    folder = data / "run" / "uniform-seed0"
    before = (folder / "metrics.jsonl").read_bytes(), (folder / "result.json").read_bytes()
    call(data, method="uniform", finetune_steps=20)
    row = json.loads((data / "run" / "comparison.json").read_text())[0]
    assert row["finetuned_specific_valid_loss"] < row["specific_valid_loss"]
    assert before == ((folder / "metrics.jsonl").read_bytes(), (folder / "result.json").read_bytes())
    call(data, method="uniform", run_dir=data / "at once", finetune_steps=20)
    at_once = json.loads((data / "at once" / "comparison.json").read_text())[0]
    assert at_once["finetuned_specific_test_loss"] == row["finetuned_specific_test_loss"]


@pytest.mark.slow
def test_sets_seconds_and_trials(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "specific", data / "second.set")
    arguments = ["--specific-sets", str(data / "specific"), str(data / "second.set"), "--same-seconds"]
    given = {"compare": "uniform,mixing", "budget_seconds": 1.0, "trials": 2, "trial_steps": 4}
    call(data, *arguments, **given)
    run = data / "run"
    assert {"specific", "second"} <= {path.name for path in run.iterdir()}
    for name in ("specific", "second"):
        found = json.loads((run / name / "search" / "mixing" / search.NAME).read_text())
        assert len(found["trials"]) == 2
        assert found["best"] == min(found["trials"], key=lambda trial: trial["specific_valid_loss"])
        used = read_settings(run / name / "mixing-seed0")
        wanted = found["best"]["settings"]
        assert used["learning_rate"] == wanted.get("learning_rate", Config().learning_rate)
    rows = json.loads((run / "tables.json").read_text())
    steps = [row for row in rows if row["budget"] == "steps"]
    assert len(steps) == 4
    assert len(rows) == 8
    with open(run / "tables.csv") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        of = [
            row["specific_test_loss"]
            for row in rows
            if (row["budget"], row["specific_set"], row["method"])
            == (line["budget"], line["specific_set"], line["method"])
        ]
        assert math.isclose(float(line["mean"]), float(np.mean(of)))
    assert (run / "tables.svg").stat().st_size > 1000
    assert (run / tables.MARKDOWN).read_text().strip() in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}
    call(data, *arguments, **given)
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}


def result(method: str, seconds: float, before: float = 0.0, seed: int = 0) -> dict:
    return {"method": method, "seed": seed, "seconds": seconds, "preparation_seconds": before}


def test_steps_that_fit_in_the_seconds(tmp_path: Path) -> None:
    config = Config(steps=100)
    found = [result("uniform", 10.0), result("uniform", 12.0), result("soba", 22.0), result("classifier", 16.0, 5.0)]
    plan = suite._plan(config, tmp_path, found)
    assert plan["seconds"] == 11.0
    assert plan["steps"] == {"uniform": 100, "soba": 50, "classifier": 54}  # (11 - 5) / 0.11
    slower = [result("uniform", 99.0), *found[1:]]
    assert suite._plan(config, tmp_path, slower) == plan, "decided once"
    other = dataclasses.replace(config, budget_seconds=5.0)
    assert suite._plan(other, tmp_path, found)["seconds"] == 5.0, "nothing was trained yet"


def test_another_budget_of_seconds_is_refused(tmp_path: Path) -> None:
    config = Config(steps=100, run_dir=tmp_path)
    suite._check_budget(config)
    folder = tmp_path / suite.SAME_SECONDS
    suite._plan(config, folder, [result("uniform", 10.0)])
    other = dataclasses.replace(config, budget_seconds=5.0)
    suite._check_budget(other)  # nothing was trained yet
    (folder / "soba-seed0").mkdir()
    (folder / "soba-seed0" / "config.yaml").write_text("format: 1")
    suite._check_budget(config)
    with pytest.raises(
        UserError, match=r"a budget of 10 seconds: give no --budget-seconds as before, or another --run-dir"
    ):
        suite._check_budget(other)


def test_ranks(tmp_path: Path) -> None:
    def row(name: str, method: str, loss: float, tuned: float | None = None) -> dict:
        return {
            "specific_set": name,
            "budget": "steps",
            "method": method,
            "specific_test_loss": loss,
            "finetuned_specific_test_loss": tuned,
        }

    rows = [
        row("a", "uniform", 2.0, 1.0),
        row("a", "uniform", 2.2, 1.2),
        row("a", "soba", 1.0, 1.2),
        row("b", "uniform", 3.0, 2.0),
        row("b", "soba", 4.0, 3.0),
    ]
    cells = tables.ranked(rows)
    cell = cells[Key("steps", "a", "specific_test_loss", "uniform")]
    assert (cell.mean, cell.rank, cell.seeds) == (pytest.approx(2.1), 2, 2)
    assert cell.std == pytest.approx(0.2 / math.sqrt(2))
    assert cells[Key("steps", "a", "finetuned_specific_test_loss", "soba")].rank == 2
    text = tables.write_tables(tmp_path, rows)
    assert "| uniform | 2.100 ± 0.141 ② | 1.100 ± 0.141 ① | 3.000 ① | 2.000 ① | 1.5 | 1.0 |" in text
    assert "| soba | 1.000 (1 seed) ① | 1.200 (1 seed) ② | 4.000 ② | 3.000 ② | 1.5 | 2.0 |" in text
    lost = [{"specific_set": "a", "budget": "steps", "method": method} for method in ("soba", "dds")]
    text = tables.write_tables(tmp_path, rows + lost)
    assert "| soba | 1.000 (1 of 2 seeds) ① | 1.200 (1 of 2 seeds) ② | 4.000 ② |" in text
    assert "| dds | – | – | – | – | – | – |" in text


def test_trials_are_draws_of_seed_method_and_number() -> None:
    assert set(search.SPACES) == set(METHODS)
    assert set(ALL) == set(METHODS) - {"frozen"}
    for method in METHODS:
        assert search.trial_settings(method, 0, 0) == {}
        first, same = (search.trial_settings(method, 0, 1) for _ in range(2))
        assert first == same
        draws = [search.trial_settings(method, 0, i) for i in range(1, 30)]
        assert len({json.dumps(draw) for draw in draws}) > 25
        for draw in draws:
            search.with_settings(Config(), draw)
            for name, value in draw.items():
                space = search.SPACES[method][name]
                inside = space.low <= value <= space.high if isinstance(space, search.Log) else value in space.values
                assert inside


def test_trials_go_through_each_list_before_they_repeat() -> None:
    for method, name in (("mixing", "mixing_fraction"), ("contrastive", "contrastive_fraction")):
        space = search.SPACES[method][name]
        assert isinstance(space, search.Among)
        for seed in range(3):
            tried = [search.trial_settings(method, seed, i + 1)[name] for i in range(2 * len(space.values))]
            assert sorted(tried[: len(space.values)]) == sorted(tried[len(space.values) :]) == sorted(space.values)
    sizes = [search.trial_settings("learning_to_reweight", 0, i, 103)["specific_batch_size"] for i in (1, 2, 3)]
    assert sorted(sizes) == [16, 64, 103]


def test_a_trial_that_was_begun_keeps_its_settings(data: Path) -> None:
    config = Config(trials=3, run_dir=data / "run")
    drawn = [trial.weights.mixing_fraction for trial in search.trial_configs(config, "mixing", corpora_of(data))]
    assert drawn[0] is None
    directory = data / "run" / "search" / "mixing" / "1" / "mixing-seed0"
    directory.mkdir(parents=True)
    begun = {"learning_rate": 3e-3, "weights": {"mixing_fraction": 0.123, "derivatives": "finite"}}
    (directory / "config.yaml").write_text(json.dumps({"format": 1, **begun}))
    again = [trial.weights.mixing_fraction for trial in search.trial_configs(config, "mixing", corpora_of(data))]
    assert again == drawn, "nothing was trained with those"
    (directory / "metrics.jsonl").write_text("{}\n")
    kept = search.trial_configs(config, "mixing", corpora_of(data))[1]
    assert (kept.weights.mixing_fraction, kept.learning_rate, kept.weights.derivatives) == (0.123, 3e-3, None)


def test_names_of_sets() -> None:
    assert [suite.set_name(x) for x in ("a/rct.txt.gz", "b/kjv/", "tfds:x:y", "*.txt")] == [
        "rct",
        "kjv",
        "tfds_x_y",
        "_",
    ]
    config = Config(specific_sets=("x/a", "y/a.txt"))
    with pytest.raises(Exception, match='two sets named "a"'):
        suite.named_sets(config)


def test_sets_of_an_earlier_command_stay_in_the_tables(data: Path) -> None:
    for name in ("law", "news"):
        shutil.copytree(data / "specific", data / name)
        call(data, "--specific-sets", str(data / name), method="uniform")
    rows = json.loads((data / "run" / "tables.json").read_text())
    assert [row["specific_set"] for row in rows] == ["news", "law"]
    other = Config(specific_sets=("finance",), run_dir=data / "run")
    (found,) = suite.earlier_sets(other, ["news"])
    assert found[0] == "law"
    assert found[1].data.specific == str(data / "law")
    assert suite.earlier_sets(Config(run_dir=data / "run"), []) == [], "a run directory of one set"


def test_test_documents_among_the_generic_ones_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DataConfig(generic=str(data / "generic.txt"), specific=str(data / "specific"), cache_dir=data / "cache")
    load_corpora(Config(length=40, data=text))
    assert "warning" not in capsys.readouterr().err
    lines = (data / "specific" / "test.txt").read_text()
    with (data / "generic.txt").open("a") as file:
        file.write(lines)
    load_corpora(Config(length=40, data=text))
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1
    assert "remove those documents from one of the two, or the test loss is too good" in printed
