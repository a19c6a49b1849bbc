"""The check before a long run, end to end, as a user calls it, at tiny sizes."""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.language_modeling.__main__ import main as language_modeling
from experiments.language_modeling.config import Config

from experiments import cli
from experiments.diagnose import report
from experiments.diagnose.__main__ import main
from experiments.diagnose.config import DiagnoseConfig

STEPS = 20
LETTERS = {"specific": "abcdefgh", "generic": "stuvwxyz"}
TRAINING = ("--batch-size", "4", "--length", "16", "--warmup", "2", "--no-progress")


pytestmark = pytest.mark.usefixtures("one_device")


def write_lines(path: Path, letters: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    lines = ("".join(rng.choice(list(letters), 60)) for _ in range(count))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two kinds of text without a letter in common."""
    write_lines(tmp_path / "generic.txt", LETTERS["generic"], 400, 0)
    for i, (part, count) in enumerate((("train", 40), ("valid", 12), ("test", 12))):
        write_lines(tmp_path / "specific" / f"{part}.txt", LETTERS["specific"], count, i + 1)
    return tmp_path


def where(data: Path) -> list[str]:
    return [
        *("--data.generic", str(data / "generic.txt"), "--data.specific", str(data / "specific")),
        *("--data.cache-dir", str(data / "cache")),
    ]


def diagnose(data: Path, *more: str, run_dir: str = "out") -> dict[str, Any]:
    sizes = ("--rows", "24", "--pairs", "3", "--batch-rows", "16", "--run-dir", str(data / run_dir))
    cli.run(DiagnoseConfig, main, [*sizes, *more])
    return json.loads((data / run_dir / "diagnose.json").read_text())


def trained(data: Path, *more: str, run_dir: str = "out") -> dict[str, Any]:
    steps = () if "--steps" in more else ("--steps", str(STEPS), "--every", "8")
    return diagnose(data, *TRAINING, *where(data), *steps, *more, run_dir=run_dir)


def test_training_writes_what_it_promises(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = trained(data)
    rows = found["measurements"]
    assert [row["step"] for row in rows] == [8, 16, STEPS]
    for row in rows:
        # Texts without a letter in common: every unit gradient points to its own letters.
        assert row["sar"] > 0.9
        assert row["gar"] > 0.65
        assert 0 <= row["sar_error"] < 0.2
        assert row["generic_valid_loss"] < row["specific_valid_loss"]  # uniform trains on generic rows
    assert found["paper_table_8"]["language modeling (c4, reuters)"] == {"sar": 0.862, "gar": 0.694}
    assert "both are above chance" in found["verdict"]
    printed, page = capsys.readouterr().out, (data / "out" / "diagnose.md").read_text()
    for text in (report.table(rows), found["verdict"]):
        assert text in printed
        assert text in page
    lines = report.table(rows).splitlines()
    assert [line.count("|") for line in lines] == [6] * 5
    assert lines[-1].startswith(f"| {STEPS} |")
    assert ElementTree.parse(data / "out" / "diagnose.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_checkpoint_gives_what_training_gave(data: Path) -> None:
    """The same flags make the same run; its checkpoint knows model and data, and other data may be measured on it."""
    last = trained(data, "--schedule-steps", "30")["measurements"][-1]
    flags = ["--method", "uniform", "--steps", str(STEPS), "--schedule-steps", "30", "--run-dir", str(data / "run")]
    cli.run(Config, language_modeling, [*flags, *TRAINING, *where(data)])
    run = str(data / "run" / "uniform-seed0")
    (restored,) = diagnose(data, "--checkpoint", run, run_dir="again")["measurements"]
    assert restored.keys() == last.keys()
    for name, value in last.items():
        assert restored[name] == pytest.approx(value, rel=1e-5), name
    for i, part in enumerate(("train", "valid", "test")):
        write_lines(data / "same" / f"{part}.txt", LETTERS["generic"], 40, 10 + i)
    found = diagnose(data, "--checkpoint", run, "--data.specific", str(data / "same"), run_dir="same_kind")
    assert found["specific"] == str(data / "same")
    (row,) = found["measurements"]
    for name in ("sar", "gar"):
        assert abs(row[name] - 0.5) < 5 * row[f"{name}_error"]
    assert "neither is above chance" in found["verdict"]


@pytest.mark.slow
def test_a_checkpoint_of_a_run_that_learns_weights(data: Path) -> None:
    flags = ["--method", "soba", "--big-batch-size", "8", "--steps", "4", "--run-dir", str(data / "run")]
    cli.run(Config, language_modeling, [*flags, *TRAINING, *where(data)])
    found = diagnose(data, "--checkpoint", str(data / "run" / "soba-seed0"))
    assert found["method"] == "soba"
    assert found["measurements"][0]["step"] == 4


@pytest.mark.parametrize(
    ("sar", "gar", "words"),
    [
        (0.75, 0.75, "both are above chance"),
        (0.75, 0.55, "only SAR is above chance"),
        (0.25, 0.75, "only GAR is above chance"),
        (0.55, 0.45, "neither is above chance"),
    ],
)
def test_verdict(sar: float, gar: float, words: str) -> None:
    sentence = report.verdict({"step": 7, "sar": sar, "sar_error": 0.03, "gar": gar, "gar_error": 0.03})
    assert words in sentence
    assert "After 7 steps" in sentence
    for text in ("chance is 50 %", "86.2 / 69.4 %", "78.1 / 68.2 %", "50.3 / 49.8 %", "Grangier et al., table 8"):
        assert text in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence


BAD_INPUT = {
    "one row": (["--rows", "1"], ["--rows 1 must be at least 2"]),
    "one pair": (["--pairs", "1"], ["--pairs 1 must be at least 2"]),
    "no steps": (["--steps", "0"], ["--steps 0 must be at least 1"]),
    "large batches": (["--batch-rows", "5000"], ["--batch-rows 5000", "specific", "give at most"]),
    "missing data": (["--data.generic", "nowhere.txt"], ["nowhere.txt", "does not exist"]),
    "no run": (["--checkpoint", "nowhere"], ["Cannot read the settings in nowhere", "METHOD-seedN"]),
    "other model": (["--checkpoint", "RUN", "--model.size", "small"], ["--checkpoint takes --model from"]),
    "other length": (["--checkpoint", "RUN", "--length", "16"], ["--checkpoint takes --length from"]),
    "no checkpoint": (["--checkpoint", "RUN"], ["holds no checkpoint"]),
    "broken settings": (["--checkpoint", "BROKEN"], ["Cannot read the settings", "'data'"]),
    "unwritable directory": (["--run-dir", "BELOW"], ["Cannot write to the run directory"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = BAD_INPUT[case]
    paths = {"RUN": data / "saved", "BROKEN": data / "broken", "BELOW": data / "generic.txt" / "out"}
    for name, settings in (("saved", {"data": {"cache_dir": str(data / "cache")}, "model": {}}), ("broken", {})):
        (data / name).mkdir()
        whole = {"method": "uniform", "seed": 0, "weights": {}, "length": 16, **settings}
        (data / name / "config.yaml").write_text(json.dumps({"format": 1, **whole}))
    chosen = [str(paths.get(x, x)) for x in given]
    training = () if "--checkpoint" in given else TRAINING
    with pytest.raises(SystemExit) as stop:
        diagnose(data, *training, *where(data), *chosen)
    assert stop.value.code == 2
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in message


def test_one_of_several_specific_sets_is_to_be_chosen(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"method": "soba", "seed": 0, "weights": {}, "model": {}, "data": {"specific": "a + b"}}
    (data / "saved").mkdir()
    (data / "saved" / "config.yaml").write_text(json.dumps({"format": 1, **settings, "task_weights": None}))
    with pytest.raises(SystemExit):
        diagnose(data, "--checkpoint", str(data / "saved"))
    assert "saved has several specific sets (a + b): choose the one to measure on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        diagnose(data, "--checkpoint", str(data / "saved"), *where(data))
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.data
def test_real_text(tmp_path: Path) -> None:
    """On clinical abstracts, the SAR of a short training lies clearly above chance."""
    folder = os.environ.get("BILEVEL_DATA")
    if not folder or not (Path(folder) / "lm" / "generic" / "train.txt.gz").exists():
        pytest.skip("BILEVEL_DATA does not name a folder with lm/generic and lm/specific")
    lm = Path(folder) / "lm"
    flags = ["--steps", "200", "--run-dir", str(tmp_path / "out"), "--data.cache-dir", str(tmp_path / "cache")]
    flags += ["--data.generic", str(lm / "generic" / "train.txt.gz"), "--no-progress"]
    cli.run(DiagnoseConfig, main, [*flags, "--data.specific", str(lm / "specific" / "rct_abstracts")])
    (row,) = json.loads((tmp_path / "out" / "diagnose.json").read_text())["measurements"]
    assert row["sar"] - 0.5 > 3 * row["sar_error"]
