"""Runs and comparisons of the linear task: results, seeds, continuing, other settings, signals, damage."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linear_task import rows as rows_of
from study_calls import (
    CLASSES,
    STEPS,
    TASK,
    call,
    changed,
    environment,
    fails,
    metrics,
    result,
    rows,
    runs,
    same_result,
    weights,
)

from bilevel.files import load_tree
from bilevel.study import ModelOptions, resolve
from bilevel.study.registry import METHODS
from bilevel.training.signals import STOPPED

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.usefixtures("with_pictures")
def test_a_comparison_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, given = tmp_path / "run", ("--targets", "1000", "0", "--big-batch-size", "24")
    call(folder, "uniform,soba", *given)
    table = (folder / "comparison.md").read_text()
    assert table.strip() in capsys.readouterr().out
    found = rows(folder)
    assert runs(folder) == [("uniform", 0), ("soba", 0)]
    for row in found:
        for name in ("seconds", "valid_loss", "test_loss", "valid_loss/generic", "share/noisy", "best_test_loss"):
            assert math.isfinite(row[name]), name
        assert row["steps"] == STEPS
        assert row["steps_to"] == {"1000.0": 4, "0.0": None}
    assert [row["epochs"] for row in found] == [STEPS * 4 / 240, STEPS * 24 / 240]
    at = [row["valid_loss"] for row in metrics(folder / "uniform-seed0") if "valid_loss" in row]
    assert found[0]["steps_to_uniform"] == (4 if at[0] <= at[1] else 8)
    assert "effective_sample_size" not in found[0]
    logits = weights(folder / "soba-seed0")
    share = np.exp(logits) / np.exp(logits).sum()
    assert found[1]["weight_on/noisy"] == pytest.approx(share[2], rel=1e-5), "a third of the rows in each domain"
    history = metrics(folder / "soba-seed0")
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert [row["step"] for row in history if "test_loss" in row] == [4, 8]
    assert all(sum(row[f"share/{d}"] for d in ("first", "second", "noise")) == pytest.approx(1) for row in history)
    assert all(row["share/noise"] == pytest.approx(row["share/noisy"]) for row in history)
    ranked = json.loads((folder / "soba-seed0" / "ranked.json").read_text())
    order = np.argsort(-logits)
    assert {i % 3 for i, _ in ranked["highest"]} == {order[0]}
    assert {i % 3 for i, _ in ranked["lowest"]} == {order[-1]}
    report = (folder / "report.html").read_text()
    for words in ("A linear task", "Rows of a line.", "data:image", "Noisy among the selected rows", "<pre>row "):
        assert words in report
    assert "http://" not in report
    assert "https://" not in report
    assert "squared units" in table
    assert "Until a test loss:\n\n| method | seeds | steps to 1000.0 | steps to 0.0 | epochs to 1000.0 |" in table


def test_the_same_command_trains_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(tmp_path, "uniform")
    first, file = rows(tmp_path), tmp_path / "uniform-seed0" / "metrics.jsonl"
    written = file.stat().st_mtime_ns
    call(tmp_path, "uniform,spcl")
    assert file.stat().st_mtime_ns == written
    assert rows(tmp_path)[0] == first[0]
    assert runs(tmp_path) == [("uniform", 0), ("spcl", 0)]
    capsys.readouterr()
    call(tmp_path, "uniform", "--eval-only")
    assert f"{first[0]['test_loss']:.3f}" in capsys.readouterr().out


def test_losses_are_those_of_the_rows(tmp_path: Path) -> None:
    """After one step of SGD, by numpy: the batch of that step, its gradient, and the loss on test."""
    call(
        tmp_path,
        "uniform",
        "--steps",
        "1",
        "--optimizer.name",
        "sgd",
        "--optimizer.momentum",
        "0",
        "--batch-size",
        "24",
    )
    from linear_task import TASK as task

    from bilevel.data import Loader

    config = resolve.default_config(task)
    splits = task.open(config.task, tmp_path)
    import jax

    key, *_ = jax.random.split(jax.random.key(0), 3)
    model = task.model(config.task, splits, ModelOptions())
    w = np.asarray(model.init(key)[0]["w"], np.float64)
    batch = Loader(splits.train, 24, seed=0).batch(0)
    w = w - 0.05 * 2 * ((batch["x"] @ w - batch["y"])[:, None] * batch["x"]).mean(0)
    for name, data in (("valid", splits.valid["specific"]), ("test", splits.test["specific"])):
        all_rows = data.rows(np.arange(len(data)))
        wanted = ((all_rows["x"] @ w - all_rows["y"]) ** 2).mean()
        assert result(tmp_path, "uniform")[f"{name}_loss"] == pytest.approx(wanted, rel=1e-5)


def test_seeds_and_reproducibility(tmp_path: Path) -> None:
    call(tmp_path / "both", "uniform", "--seeds", 2)
    call(tmp_path / "second", "uniform", "--seed", 1)
    first, second = rows(tmp_path / "both")
    assert second["test_loss"] == result(tmp_path / "second", "uniform", 1)["test_loss"] != first["test_loss"]
    table = (tmp_path / "both" / "comparison.md").read_text()
    losses = [first["test_loss"], second["test_loss"]]
    assert f"| uniform | 2 | {np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f} |" in table


ELSEWHERE = ("uniform", "soba", "spcl", "contrastive", "retrained_dds", "frozen", "replayed", "rho_loss", "svp", "mixing", "dds",
             "warm_soba", "rl_sampler", "uniform_pairs", "uniform_languages", "related", "tcs", "multilingual_dds",
             "tcs_dds", "token_selection")  # fmt: skip
"""Methods that other tests run, those of languages among the tests of translation, that of tokens among those of text."""


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ELSEWHERE])
def test_every_other_method_runs(tmp_path: Path, method: str) -> None:
    call(tmp_path, method, *CLASSES, "--steps", 2)
    assert math.isfinite(result(tmp_path, method)["test_loss"])


INTERRUPTED = """
import os, signal
from linear_task import *

class Interrupted(LinearTask):
    def evaluate(self, config, splits, model):
        inner, seen = super().evaluate(config, splits, model), []

        def evaluate(*given):
            seen.append(1)
            if str(len(seen)) == os.environ.get("INTERRUPT_AT"):
                os.kill(os.getpid(), getattr(signal, os.environ["INTERRUPT_BY"]))
            return inner(*given)
        return evaluate

TASK = Interrupted()
"""


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A task whose process gets a signal in an evaluation of a run; each measures two sets."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    return tmp_path / "interrupted.py"


FLAGS = ("--evaluate-every", 2, "--checkpoint-every", 2)


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, interrupted: Path) -> None:
    """Killed in the evaluation of step 6, with the checkpoint of step 4 saved; bit for bit."""
    command = ["compare", str(interrupted), "--compare", "soba", *map(str, FLAGS), "--run-dir", str(tmp_path / "cut")]
    killed = subprocess.run(
        [sys.executable, "-m", "bilevel.cli", *command], capture_output=True, text=True,
        env={**environment(), "INTERRUPT_AT": "5", "INTERRUPT_BY": "SIGKILL"},
    )  # fmt: skip
    cut, whole = tmp_path / "cut" / "soba-seed0", tmp_path / "whole" / "soba-seed0"
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cut / "result.json").exists()
    assert {int(path.name) for path in (cut / "checkpoints").iterdir() if path.name.isdecimal()} <= {2, 4}
    for name in ("cut", "whole"):
        call(tmp_path / name, "soba", *FLAGS, task=interrupted)
    assert same_result(result(tmp_path / "cut", "soba"), result(tmp_path / "whole", "soba"))
    np.testing.assert_array_equal(weights(cut), weights(whole))
    kept = [load_tree(run / "weights_best.safetensors") for run in (cut, whole)]
    np.testing.assert_array_equal(kept[0][0]["of"], kept[1][0]["of"])
    assert kept[0][1] == kept[1][1], "the same step and value"
    assert [row["step"] for row in metrics(cut)] == [row["step"] for row in metrics(whole)] == [2, 4, 6, 8]


def test_a_signal_saves_first(
    tmp_path: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM at step 4, so that it stops at 6; SIGINT at the last step, which keeps the next run from beginning."""
    for name, at, step in (("SIGTERM", "3", "4"), ("SIGINT", "1", "8")):
        with monkeypatch.context() as patch:
            patch.setenv("INTERRUPT_AT", at)
            patch.setenv("INTERRUPT_BY", name)
            with pytest.raises(SystemExit) as stop:
                call(tmp_path / "cut", "uniform,spcl", *FLAGS, task=interrupted)
        assert stop.value.code == STOPPED == 3
        said = capsys.readouterr().err
        assert said.endswith(f"Stopped and saved; the same command continues in {tmp_path / 'cut'}.\n"), said
        assert step in {path.name for path in (tmp_path / "cut" / "uniform-seed0" / "checkpoints").iterdir()}
    assert not (tmp_path / "cut" / "spcl-seed0").exists()
    for name in ("cut", "whole"):
        call(tmp_path / name, "uniform,spcl", *FLAGS, task=interrupted)
    for method in ("uniform", "spcl"):
        assert same_result(result(tmp_path / "cut", method), result(tmp_path / "whole", method))


def test_what_may_change_and_what_may_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run, asked for with other settings; and the settings that decide nothing."""
    call(tmp_path, "soba")
    free = ("--log-every", 4, "--evaluate-every", 8, "--checkpoint-every", 8, "--evaluate-rows", 10, "--steps-per-call", 2,
            "--resident", "never", "--targets", "1", "--preset", "paper")  # fmt: skip
    call(tmp_path, "soba", *free[:-2])
    for flags, name in (
        (("--optimizer.learning-rate", 0.5), "optimizer.learning_rate was 0.05, now 0.5"),
        (("--soba.damping", 0.5), "soba.damping was 0.0, now 0.5"),
        (("--data.specific", "second"), 'data.specific was "first", now "second"'),
        (("--steps", 9), "steps was 8, now 9"),
        (("--micro-batches", 2), "micro_batches was 1, now 2"),
        (free[-2:], "soba.estimator was null"),
    ):
        fails(tmp_path, "soba", *flags)
        error = capsys.readouterr().err
        assert f"{tmp_path / 'soba-seed0'} holds a run with other settings" in error
        assert name in error


def test_a_run_continues_with_other_settings_that_decide_nothing(
    tmp_path: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("INTERRUPT_AT", "3")
        patch.setenv("INTERRUPT_BY", "SIGTERM")
        with pytest.raises(SystemExit):
            call(tmp_path / "cut", "uniform", *FLAGS, task=interrupted)
    more = ("--log-every", 1, "--evaluate-every", 8, "--checkpoint-every", 8, "--resident", "never")
    call(tmp_path / "cut", "uniform", *more, task=interrupted)
    call(tmp_path / "whole", "uniform", task=interrupted)
    one, other = result(tmp_path / "cut", "uniform"), result(tmp_path / "whole", "uniform")
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-6)
    assert [row["step"] for row in metrics(tmp_path / "cut" / "uniform-seed0")] == [2, 4, 6, 7, 8]


def test_other_data_under_the_same_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(tmp_path / "run", "uniform", task=changed(tmp_path, "rng = np", "rng = np"))
    other = changed(tmp_path, "kind * 9 + i", "kind * 9 + i + (i == 3)")
    for more in ((), ("--eval-only",)):
        fails(tmp_path / "run", "uniform", *more, task=other)
        error = capsys.readouterr().err
        assert "holds a run with other settings (content_hash.test_specific was" in error
        assert error.count("content_hash") == 1


def test_evaluation_only_of_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(tmp_path / "typo", "uniform", "--eval-only")
    assert "holds no checkpoint: train first, without --eval-only." in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "uniform-seed0"
    call(tmp_path, "uniform")
    kept = (folder / "result.json").read_text()
    (folder / "result.json").write_text('{"method": "unif')
    fails(tmp_path, "uniform")
    assert f"{folder / 'result.json'} is damaged" in capsys.readouterr().err
    (folder / "result.json").write_text(kept)
    (folder / "config.yaml").write_text("steps: [")
    fails(tmp_path, "uniform")
    assert f"Cannot read the settings in {folder / 'config.yaml'}" in capsys.readouterr().err


def test_a_diverging_run_names_the_step_and_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(
        tmp_path,
        "uniform",
        "--optimizer.learning-rate",
        1e38,
        "--optimizer.warmup",
        6,
        "--steps",
        12,
        "--checkpoint-every",
        1,
    )
    error = capsys.readouterr().err
    found = re.search(r"at step (\d+)|after step (\d+)", error)
    assert found, error
    assert "--run-dir" in error
    kept = [path.name for path in (tmp_path / "uniform-seed0" / "checkpoints").glob("[0-9]*")]
    assert all(int(step) <= int(found[1] or found[2]) for step in kept)


def test_settings_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = resolve.default_config
    monkeypatch.setattr(resolve, "default_config", lambda *given: calls.append(given) or original(*given))
    call(tmp_path, "uniform", "--seeds", 2, "--steps", 2, "--trials", 1, "--trial-steps", 2, "--finetune.steps", 2)
    assert len(calls) == 1


def test_a_file_of_settings_makes_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bilevel import cli

    call(tmp_path / "run", "soba", "--soba.damping", 0.25, "--steps", 6, "--data.specific", "second")
    file = tmp_path / "run" / "soba-seed0" / "config.yaml"
    cli.main(["compare", str(TASK), "--config", str(file), "--run-dir", str(tmp_path / "again")])
    assert same_result(result(tmp_path / "run", "soba"), result(tmp_path / "again", "soba"))
    assert file.read_text() == (tmp_path / "again" / "soba-seed0" / "config.yaml").read_text()
    found = cli.parse(["compare", str(TASK), f"--config={file}", "--steps", "7", "--soba.damping", "0.5"]).settings
    assert (found.study.steps, found.methods["soba"].damping, found.task.data.specific) == (7, 0.5, "second")
    for text, words in (
        ("stepz: 3", " sets stepz, which does not exist: choose from anograd, batch_size"),
        ("soba: {dumping: 1}", " sets soba.dumping, which does not exist: choose from alpha_batch"),
        ("soba: 3", " sets soba to 3, which must be a dictionary"),
        ("data: {colour: red}", " sets data.colour, which does not exist: choose from classes, rows, specific."),
        ("steps: 0", " sets steps to 0, which must be at least 1."),
        ("steps: many", " sets steps to 'many', which must be a valid integer"),
        ("model: {network: cubic}", " sets model.network to 'cubic', which must be 'linear', 'affine' or 'classes'."),
        ("task: language_modeling", "is of the task language_modeling, not of linear"),
        ("- 3", "holds no settings"),
        ("steps: [", "cannot be read"),
    ):
        (tmp_path / "my.yaml").write_text(text)
        fails(tmp_path / "none", "soba", "--config", tmp_path / "my.yaml")
        error = capsys.readouterr().err
        assert error.startswith(f"error: --config {tmp_path / 'my.yaml'}")
        assert words in error
        assert error.count("\n") == 1
    (tmp_path / "my.yaml").write_text(
        "compare: uniform\noptimizer: {learning_rate: 1e-3, milestones: [3, 4]}\nrun_dir: x"
    )
    found = cli.parse(["compare", str(TASK), "--config", str(tmp_path / "my.yaml")]).settings
    assert found.study.optimizer.learning_rate == 1e-3
    assert found.study.optimizer.milestones == (3, 4)
    assert (found.study.compare, found.prepared) == ("uniform", Path("x/prepared"))


def test_presets_arrive(tmp_path: Path) -> None:
    from bilevel import cli

    paper = cli.parse(["compare", str(TASK), "--compare", "dds", "--preset", "paper"]).settings
    assert paper.study.steps == 8, "the task's default holds always"
    assert (paper.methods["dds"].alpha_batch, paper.methods["dds"].probe_every) == ("uniform", 0)
    flag = cli.parse(
        ["compare", str(TASK), "--preset=paper", "--compare=dds", "--dds.alpha-batch", "filtered"]
    ).settings
    assert flag.methods["dds"].alpha_batch == "filtered"
    (tmp_path / "my.yaml").write_text("preset: paper\n")
    in_file = cli.parse(["compare", str(TASK), "--compare", "dds", "--config", str(tmp_path / "my.yaml")]).settings
    assert in_file.methods["dds"] == paper.methods["dds"]


def test_data_on_the_device_train_the_same(tmp_path: Path) -> None:
    for method, flags in (("soba", ("--soba.specific-candidates", 3)), ("mixing", ("--mixing.fraction", 0.25))):
        for residence in ("never", "always"):
            call(tmp_path / residence, method, "--resident", residence, *flags)
        one, other = (result(tmp_path / residence, method) for residence in ("never", "always"))
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
        last = [metrics(tmp_path / residence / f"{method}-seed0")[-1] for residence in ("never", "always")]
        assert last[0]["share/noisy"] == last[1]["share/noisy"]


def test_uniform_may_train_on_specific_and_held_out_rows_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 and 40 rows beside 240, of which known faults are counted among the generic ones alone."""
    for residence in ("never", "always"):
        flags = ("--uniform.also", "specific", "held_out", "--resident", residence, "--batch-size", 50)
        call(tmp_path / residence, "uniform", *flags)
        assert "uniform: trained on 240 generic, 60 specific and 40 held-out rows." in capsys.readouterr().out
    one, other = (result(tmp_path / residence, "uniform") for residence in ("never", "always"))
    assert one["training_rows"] == other["training_rows"] == 340
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
    assert one["share/noisy"] == pytest.approx(1 / 3, abs=0.05), "of 240 rows, not of 340"
    call(tmp_path / "plain", "uniform", "--batch-size", 50)
    assert "trained on" not in capsys.readouterr().out
    assert result(tmp_path / "plain", "uniform")["test_loss"] != one["test_loss"]


def test_rows_of_the_task_are_as_the_tests_say() -> None:
    data = rows_of(np.arange(9) % 3, 0, "rows").rows(np.arange(9))
    np.testing.assert_allclose(data["y"][::3], data["x"][::3].sum(1), rtol=1e-5)
    np.testing.assert_allclose(data["y"][1::3], -data["x"][1::3].sum(1), rtol=1e-5)


def test_rows_are_used_no_more_often_than_the_flag_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 rows for 15 batches of 4."""
    flags = ("--data.rows", 60, "--max-uses", 1, "--steps", 15, "--log-every", 1)
    with pytest.warns(UserWarning, match=r"had fewer rows left than a batch.*raise max_uses \(--max-uses\)"):
        call(tmp_path / "whole", "uniform,soba", *flags)
    left_out = [row["rows_left_out"] for row in metrics(tmp_path / "whole/soba-seed0")]
    assert left_out[0] == 0
    assert max(left_out) > 0
    assert "rows_left_out" not in metrics(tmp_path / "whole/uniform-seed0")[0]
    fails(tmp_path / "long", "soba", *flags, "--steps", 16)
    assert "train on 64 rows, and --max-uses 1 leaves 60" in " ".join(capsys.readouterr().err.split())
    fails(tmp_path / "twice", "soba", *flags, "--soba.filter", "importance")
    assert "--max-uses 1 does not fit soba, whose filter (importance)" in " ".join(capsys.readouterr().err.split())
    fails(tmp_path / "more", "soba", *flags, "--max-uses", 256)
    assert "--max-uses 256 must be at least 0 and at most 255" in " ".join(capsys.readouterr().err.split())
