"""Which runs of earlier commands stand in the tables, and what later seeds take over from a search."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from experiments.language_modeling.config import Config
from language_toy import call, write_texts

from bilevel.training.run_dir import read_settings
from experiments.language_modeling import search

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def rows(data: Path) -> list[tuple[str, int]]:
    found = json.loads((data / "run" / "comparison.json").read_text())
    return [(row["method"], row["seed"]) for row in found]


@pytest.mark.slow
def test_runs_on_other_data_are_left_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--specific-sets", str(data / "specific")]
    call(data, *sets, method="uniform")
    with open(data / "generic.txt", "a") as file:
        file.write("one more line of text\n")
    call(data, *sets, method="mixing")
    found = json.loads((data / "run" / "tables.json").read_text())
    assert [row["method"] for row in found] == ["mixing"]
    line = f"{data / 'run' / 'specific' / 'uniform-seed0'} is left out of the tables: it was trained on other generic data."
    assert capsys.readouterr().err.count(line) == 1
    shutil.copytree(data / "specific", data / "second")
    call(data, "--specific-sets", str(data / "second"), method="uniform")
    found = json.loads((data / "run" / "tables.json").read_text())
    assert [(row["specific_set"], row["method"]) for row in found] == [("second", "uniform"), ("specific", "mixing")]


@pytest.mark.slow
def test_seeds_with_other_weights_are_left_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, method="mixing")
    call(data, compare="mixing,uniform", seed=1, weights__mixing_fraction=0.75)
    assert rows(data) == [("mixing", 1), ("uniform", 1)]
    assert "mixing-seed0 is left out of the tables" in capsys.readouterr().err
    call(data, method="uniform", seed=2)
    assert sorted(rows(data)) == [("mixing", 1), ("uniform", 1), ("uniform", 2)], "the latest run of mixing counts"
    call(data, method="mixing", seed=3, weights__mixing_fraction=0.25)
    assert [row for row in rows(data) if row[0] == "mixing"] == [("mixing", 3), ("mixing", 0)]
    told = capsys.readouterr().err
    assert "mixing-seed1 is left out" in told
    assert "mixing-seed0 is left out" not in told


@pytest.mark.slow
def test_later_seeds_take_what_the_search_found(data: Path) -> None:
    given = {"method": "mixing", "trials": 2, "trial_steps": 4}
    call(data, **given)
    call(data, seed=1, **given)
    assert rows(data) == [("mixing", 1), ("mixing", 0)]
    run = data / "run"
    assert not list((run / "search").glob("**/mixing-seed1"))
    settings = [read_settings(run / f"mixing-seed{seed}") for seed in (0, 1)]
    assert settings[0]["learning_rate"] == settings[1]["learning_rate"]
    assert settings[0]["weights"] == settings[1]["weights"]


@pytest.mark.slow
def test_the_fraction_of_mixing_is_chosen_on_valid(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, method="mixing", weights__mixing_fraction=None)
    found = json.loads((data / "run" / "search" / "mixing_fraction" / search.NAME).read_text())
    assert [trial["settings"]["mixing_fraction"] for trial in found["trials"]] == [0.25, 0.5, 0.75]
    best = min(found["trials"], key=lambda trial: trial["specific_valid_loss"])["settings"]
    used = read_settings(data / "run" / "mixing-seed0")
    assert used["weights"]["mixing_fraction"] == best["mixing_fraction"]
    capsys.readouterr()
    call(data, "--eval-only", method="mixing", weights__mixing_fraction=None)
    assert "| mixing | 1 |" in capsys.readouterr().out


def test_one_row_of_each_kind_at_least_is_tried(tmp_path: Path) -> None:
    corpora: Any = None
    for rows, fractions in ((16, search.FRACTIONS), (2, (0.5,))):
        config = Config(batch_size=rows, run_dir=tmp_path)
        tried = [trial.weights.mixing_fraction for trial in search.trial_configs(config, "mixing", corpora)]
        assert tried == list(fractions)
    assert search.trial_configs(Config(), "uniform", corpora) == []


def test_runs_of_mixing_that_were_begun_keep_their_fraction(data: Path) -> None:
    call(data, method="mixing")
    call(data, method="mixing", weights__mixing_fraction=None, seed=1)
    assert rows(data) == [("mixing", 1), ("mixing", 0)]
    assert not (data / "run" / "search").exists()


def test_equal_seconds_and_a_longer_schedule_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(data, "--same-seconds", compare="uniform,mixing", schedule_steps=24)
    assert "--schedule-steps 24 after --steps 12: leave one of the two away" in capsys.readouterr().err
    assert not (data / "run").exists()
