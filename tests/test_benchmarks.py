"""The benchmarks run, at sizes that take seconds, and write what they promise."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_run import random_run

ROOT = Path(__file__).parents[1]


def run(module: str, *flags: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_step_cost(tmp_path: Path) -> None:
    flags = ["--sizes", "xs", "--methods", "soba", "--derivatives", "finite", "--big-batches", "16", "--repeats", "2"]
    table = run("step_cost", *flags, "--cache-dir", str(tmp_path / "cache"), "--json", str(tmp_path / "cost.json"))
    rows: list[dict[str, Any]] = json.loads((tmp_path / "cost.json").read_text())
    assert [(row["blocks"], row["update_every"], row["probe_every"]) for row in rows] == [
        (blocks, *every) for blocks in (0, 1) for every in ((1, 1), (2, 2), (1, 2), (4, 4))
    ]
    for row in rows:
        assert (row["size"], row["big_batch_size"], row["method"], row["derivatives"]) == ("xs", 256, "soba", "finite")
        assert row["seconds_ratio"] > 0
        assert row["scoring_seconds_ratio"] > 0
        assert row["temp_bytes"] > 0
    ratios = [row["flops_ratio"] for row in rows]
    assert 3.3 > ratios[0] > ratios[2] > ratios[1] > ratios[3] > 1
    assert all(last < everything for everything, last in zip(ratios[:4], ratios[4:], strict=True))
    assert len(table.splitlines()) == 2 + len(rows)


@pytest.mark.slow
def test_derivative_errors(tmp_path: Path) -> None:
    flags = ["--size", "xs", "--train-steps", "50", "--batches", "2", "--scales", "1e-3,1e-4", "--probe-blocks", "1"]
    run("derivative_errors", *flags, "--cache-dir", str(tmp_path / "cache"), "--json", str(tmp_path / "errors.json"))
    rows: list[dict[str, Any]] = json.loads((tmp_path / "errors.json").read_text())
    assert len(rows) == 3 * 3
    full, half = rows[:3], rows[6:]
    assert (
        [row["way"] for row in full] == [row["way"] for row in half] == ["forward", "finite, 0.001", "finite, 0.0001"]
    )
    for error in ("alignments", "product"):
        assert full[0][error] == 0, "the reference itself"
        assert 0 < full[2][error] < full[1][error] < 0.1, "float32: the smaller step is nearer"
        assert half[2][error] > 3 * half[1][error], "bfloat16: the smaller step drowns in rounding"
        assert 0 < half[0][error] < 0.1


@pytest.mark.slow
def test_selection_cost(tmp_path: Path) -> None:
    """At n_b/n_B = 0.1 selection costs at most 4.5 uniform steps if the target scores (10F + 3F over 3F), 1.7 with a proxy."""
    pairs = "resnet18:target,resnet18:cnn,cnn:target,cnn:cnn-small"
    flags = ["--pairs", pairs, "--batch-size", "16", "--no-time", "--json", str(tmp_path / "cost.json")]
    table = run("selection_cost", *flags)
    rows: list[dict[str, Any]] = json.loads((tmp_path / "cost.json").read_text())
    kinds = [(row["target"], row["scorer"], row["statistics"]) for row in rows]
    assert kinds == [
        ("resnet18", "target", "batch"),
        ("resnet18", "target", "running"),
        ("resnet18", "cnn", "batch"),
        ("cnn", "target", "batch"),
        ("cnn", "cnn-small", "batch"),
    ]
    for row in rows:
        assert 1 < row["flops_ratio"] <= (4.5 if row["scorer"] == "target" else 1.7), row
    assert all(row["flops_ratio"] > 4 for row in rows if row["scorer"] == "target"), "all rows are scored"
    assert len(table.splitlines()) == 2 + len(rows)


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    small = ["--layers", "2", "--width", "128", "--heads", "4", "--length", "64", "--batch-size", "16"]
    flags = [*small, "--big-batch-size", "64", "--devices", "8", "--methods", "plain,soba,soba bfloat16"]
    run("dry_run", *flags, "--json", str(tmp_path / "dry.json"))
    plain, wide, narrow = json.loads((tmp_path / "dry.json").read_text())
    # Adam: parameters and two moments. SOBA adds v and two moments of its own.
    state = 3 * 4 * plain["parameters"] / 8
    assert plain["argument_bytes"] == pytest.approx(wide["argument_bytes"] - state, rel=0.1)
    assert narrow["argument_bytes"] == pytest.approx(wide["argument_bytes"] - state / 2, rel=0.1)
    assert wide["donated_bytes"] == pytest.approx(wide["output_bytes"], rel=0.05)


@pytest.mark.slow
def test_command_cost() -> None:
    small = ["--model.network", "xs", "--model.weighting", "conv", "--batch-size", "8", "--big-batch-size", "32"]
    tables = [
        run("command_cost", "language_modeling", *small, "--preset", name, "--compare", "uniform,soba")
        for name in ("atd", "default")
    ]
    paper, ours = (float(table.splitlines()[-1].split("|")[3]) for table in tables)
    assert paper > 4 > ours > 1, (
        "the paper's settings cost three forward passes more, and probe all layers on every step"
    )


@pytest.mark.slow
def test_translation_cost(tmp_path: Path) -> None:
    small = ["--models", "xs", "--rows", "2", "--pieces", "4", "--vocabulary", "12", "--repeats", "1"]
    run("translation_cost", *small, "--json", str(tmp_path / "cost.json"))
    rows: list[dict[str, Any]] = json.loads((tmp_path / "cost.json").read_text())
    assert [row["program"] for row in rows] == ["forward", "gradient", "search, beam 4"]
    assert rows[0]["seconds_ratio"] == 1
    assert rows[1]["megabytes"] > rows[0]["megabytes"]


@pytest.mark.slow
def test_evaluation_speed() -> None:
    lines = run("evaluation_speed", "--rows", "24", "--at-once", "8", "24").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["8 rows at once", "24 rows at once"]
    assert all(float(line.split(": ")[1].split()[0]) >= 0 for line in lines)


@pytest.mark.slow
def test_loader(tmp_path: Path) -> None:
    flags = ["--parts", "loader", "--repeats", "1", "--cache-dir", str(tmp_path / "cache")]
    run("loader", *flags, "--json", str(tmp_path / "loader.json"))
    rows: list[dict[str, Any]] = json.loads((tmp_path / "loader.json").read_text())["loader"]
    assert {(row["T"], row["B"]) for row in rows} >= {(64, 256), (128, 16384)}
    assert all(0 < row["GB/s"] < 1000 for row in rows)


PARSING = """#!/bin/sh
exec "{python}" -c 'import sys; from bilevel.cli import parse; print(parse(sys.argv[1:]).settings.study.run_dir)' "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["compare_lm", "compare_small_lm", "compare_images"])
def test_commands_of_scripts_are_understood(script: str, tmp_path: Path) -> None:
    """Each command is parsed, without being run, as `bilevel` would parse it."""
    command = tmp_path / "bin" / "bilevel"
    command.parent.mkdir()
    command.write_text(PARSING.format(python=sys.executable))
    command.chmod(0o755)
    for name in ("rct_abstracts", "reuters"):
        folder = tmp_path / "lm" / "specific" / name
        folder.mkdir(parents=True)
        for part in ("train", "valid", "test"):
            (folder / f"{part}.txt.gz").write_bytes(gzip.compress(b"a line\n" * 400))
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    call = ["bash", str(ROOT / "benchmarks" / f"{script}.sh"), str(tmp_path), str(tmp_path / "runs")]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = done.stdout.split()
    assert all(folder.startswith(str(tmp_path / "runs")) for folder in folders)
    assert len(folders) == {"compare_lm": 1, "compare_small_lm": 4, "compare_images": 6}[script]


@pytest.mark.slow
def test_variants_are_settings_of_their_methods() -> None:
    program = """
from pathlib import Path
from benchmarks.tune_lm import VARIANTS, TuneConfig, _config
for name in VARIANTS:
    config, method = _config(TuneConfig(Path("data")), name)
    assert method in config.methods
print(len(VARIANTS))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout or 0) > 100, done.stderr[-2000:]


@pytest.mark.slow
def test_a_sampler_finds_right_labels_by_its_rewards(tmp_path: Path) -> None:
    file = tmp_path / "rewards.json"
    table = run("sampler_rewards", "--seeds", "1", "--entropy-bonuses", "0,0.01", "--json", str(file))
    uniform, alone, bonus = json.loads(file.read_text())
    assert len(table.splitlines()) == 2 + 3
    assert uniform["right_last"] == pytest.approx(0.57, abs=1e-6), "epochs of all rows"
    for learned in (alone, bonus):
        assert learned["right_last"] > 0.8
        assert learned["validation_loss"] < uniform["validation_loss"] - 0.1
    assert alone["effective_sample_size"] < 10 < 25 < bonus["effective_sample_size"]


@pytest.mark.slow
def test_select_speed(tmp_path: Path) -> None:
    """The default network scores at least 8 MB of plain text in a second of one core."""
    weights = random_run(tmp_path / "soba-seed0", length=64, width=32)
    letters = np.random.default_rng(0).choice(np.frombuffer(b"abcdefghij klmnopqrst", np.uint8), (100_000, 400))
    letters[:, -1] = ord("\n")
    (tmp_path / "corpus.txt").write_bytes(letters.tobytes())
    table = run("select_speed", "--weights", str(weights), "--corpus", str(tmp_path / "corpus.txt"), "--rounds", "1")
    seconds = [float(line.split("|")[2]) for line in table.splitlines()[2:]]
    assert 40 / (seconds[0] - seconds[1]) > 8


@pytest.mark.slow
def test_selection_baselines(tmp_path: Path) -> None:
    """DSIR, fastText and the classifier find the one of three kinds of documents that the target documents are of."""
    pytest.importorskip("data_selection")
    pytest.importorskip("fasttext")
    words = {kind: [f"{kind}{i}" for i in range(30)] for kind in ("red", "green", "blue")}
    draws = np.random.default_rng(0)

    def write(file: str, kinds: Iterable[str]) -> None:
        path = tmp_path / "data" / "lm" / f"{file}.txt.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        documents = (" ".join(draws.choice(words[kind], 12)) for kind in kinds)
        path.write_bytes(gzip.compress("".join(f"{document}\n" for document in documents).encode()))

    write("generic/train", draws.permutation(["red", "green", "blue"] * 200))
    for part, count in (("train", 200), ("valid", 40), ("test", 40)):
        write(f"specific/reuters/{part}", ["green"] * count)
    folder, selectors = tmp_path / "runs", ["random", "dsir", "fasttext_long", "classifier", "soba_gumbel"]
    small = ["--steps", "6", "--finetune-steps", "3", "--flags=--batch-size 8 --big-batch-size 32"]
    flags = ["--data-dir", str(tmp_path / "data"), "--run-dir", str(folder), "--sets", "reuters", "--documents", "50"]
    flags += ["--seeds", "0", "--selectors", *selectors, *small]
    output = run("selection_baselines", *flags)
    case = folder / "reuters-50-seed0"
    kept = {name: (case / name / "selected.txt").read_text().splitlines() for name in selectors}
    assert {len(documents) for documents in kept.values()} == {60}
    right = {name: sum("green" in document for document in documents) for name, documents in kept.items()}
    assert right["random"] < 35
    for name in ("dsir", "fasttext_long", "classifier"):
        assert right[name] >= 57, right
    losses, seconds = output.split("\n\n")
    assert [line.split(" | ")[0] for line in losses.splitlines()[2:]] == [f"| {name}" for name in selectors]
    for line, name in zip(losses.splitlines()[2:], selectors, strict=True):
        trained = case / name / "model" / "uniform-seed0"
        before = json.loads((trained / "result.json").read_text())["test_loss"]
        after = json.loads((trained / "finetuned.json").read_text())["results"]["finetuned_test_loss"]
        assert line == f"| {name} | {before:.3f} | {after:.3f} |"
    assert float(seconds.splitlines()[-2].split(" | ")[1]) > 0, "the classifier took a while"
    note = case / "dsir" / "selected.json"
    written = note.stat().st_mtime_ns
    assert run("selection_baselines", *flags) == output
    assert note.stat().st_mtime_ns == written, "nothing is done again"
    note.unlink()
    run("selection_baselines", *flags)
    assert (case / "dsir" / "selected.txt").read_text().splitlines() == kept["dsir"], "the seed decides the draw"
