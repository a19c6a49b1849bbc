"""The language-modelling experiment end to end, as a user calls it, at tiny sizes."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.language_modeling.build import (
    build_loaders,
    build_weight_optimizer,
    check_rows,
    last_blocks,
    mixed_rows,
)
from experiments.language_modeling.config import ALL, Config, DataConfig, MethodConfig, ModelConfig, settings_of
from experiments.language_modeling.corpora import load_corpora
from experiments.language_modeling.run import settings_dict
from experiments.runs import STOPPED
from language_toy import call, flags, write_texts

from bilevel.nn.transformer import TransformerConfig
from bilevel.training.run_dir import read_settings
from bilevel.types import UserError
from experiments.language_modeling import checks, comparison

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def results(data: Path) -> list[dict]:
    return json.loads((data / "run" / "comparison.json").read_text())


@pytest.mark.slow
def test_the_same_command_skips_what_is_done(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(data, compare="uniform")
    first = results(data)
    file = data / "run" / "uniform-seed0" / "metrics.jsonl"
    written = file.stat().st_mtime_ns
    call(data, compare="uniform,dds")
    assert file.stat().st_mtime_ns == written
    assert results(data)[0] == first[0]
    assert results(data)[1]["method"] == "dds"


@pytest.mark.slow
def test_seeds_and_reproducibility(data: Path) -> None:
    call(data, compare="dds", seeds=2)
    first = results(data)
    call(data, compare="dds", seed=1, run_dir=data / "again")
    second = json.loads((data / "again" / "comparison.json").read_text())
    assert first[1]["specific_test_loss"] == second[0]["specific_test_loss"]
    assert first[1]["specific_test_loss"] != first[0]["specific_test_loss"]


@pytest.mark.slow
def test_frozen_weights_and_evaluation_only(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, method="soba")
    call(data, method="frozen", weights__frozen_from=data / "run" / "soba-seed0")
    weights = [np.load(data / "run" / f"{m}-seed0" / "weights.npz") for m in ("soba", "frozen")]
    for name in weights[0].files:
        np.testing.assert_array_equal(weights[0][name], weights[1][name])
    wanted = results(data)[0]["specific_test_loss"]
    capsys.readouterr()
    call(data, "--eval-only", method="frozen", weights__frozen_from=data / "run" / "soba-seed0")
    assert f"{wanted:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_resident_data_train_the_same(data: Path) -> None:
    mixed = {"method": "soba", "weights__specific_candidates": 3}
    call(data, "--resident", "never", **mixed)
    held = {**mixed, "run_dir": data / "held", "data__generic_labels": data / "labels.tsv"}
    call(data, "--resident", "always", **held)
    rows = [json.loads((data / name / "comparison.json").read_text())[0] for name in ("run", "held")]
    for name in ("specific_test_loss", "generic_loss", "effective_sample_size"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4), name
    assert not {"resident", "steps_per_call"} & set(read_settings(data / "held" / "soba-seed0"))
    call(data, "--resident", "never", **held)
    assert json.loads((data / "held" / "comparison.json").read_text())[0] == rows[1]


@pytest.mark.slow
def test_resident_batches_of_two_data_sets(data: Path) -> None:
    given: dict[str, object] = {"method": "mixing", "data__generic_labels": data / "labels.tsv"}
    call(data, "--resident", "never", **given)
    call(data, "--resident", "always", **given, run_dir=data / "held")
    folders = [data / name / "mixing-seed0" for name in ("run", "held")]
    one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert two["specific_test_loss"] == pytest.approx(one["specific_test_loss"], rel=1e-4)
    one, two = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in folders)
    assert two["share/lower"] == one["share/lower"]


def test_mixed_rows_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [mixed_rows(0.1, 16, count) for count in (1, 2, 4, 8)] == [2, 2, 4, 8]
    assert [mixed_rows(fraction, 4, 2) for fraction in (0.01, 0.5, 0.99)] == [2, 2, 2]
    assert mixed_rows(0.6, 16, 4) == 12
    with pytest.raises(UserError, match=r"--weights\.mixing-fraction 0\.1 of --batch-size 2: .* two rows a process"):
        mixed_rows(0.1, 2, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    check_rows(Config(batch_size=4), ["uniform", "mixing", "soba"])
    odd = Config(batch_size=4, weights=MethodConfig(specific_candidates=3))
    check_rows(odd, ["uniform", "mixing"])
    with pytest.raises(UserError, match=r"--weights\.specific-candidates 3 cannot be divided among 2 processes"):
        check_rows(odd, ["uniform", "soba"])


def start(data: Path, **given: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.language_modeling", *flags(data, **given)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_weights(directory: Path) -> list[np.ndarray]:
    with np.load(directory / "soba-seed0" / "weights.npz") as stored:
        return [stored[name] for name in stored.files]


@pytest.mark.slow
def test_kill_terminate_and_continue(data: Path) -> None:
    """SIGKILL, then SIGTERM, then to the end: bit for bit what an uninterrupted run gives."""
    given: dict[str, object] = {"method": "soba", "steps": 600, "checkpoint_every": 25, "evaluate_every": 200}
    for stop, marker, code in ((signal.SIGKILL, "25", -9), (signal.SIGTERM, None, STOPPED)):
        process = start(data, **given)
        checkpoints = data / "run" / "soba-seed0" / "checkpoints"
        known = set(checkpoints.glob("*")) if marker is None else set()
        if marker is not None:
            wait_for(checkpoints / marker, process)
        else:
            while not set(checkpoints.glob("*")) - known:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
        process.send_signal(stop)
        _, error = process.communicate(timeout=120)
        assert process.returncode == code, error
    call(data, **given)
    call(data, **given, run_dir=data / "whole")
    for a, b in zip(final_weights(data / "run"), final_weights(data / "whole"), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [
        [json.loads(line)["step"] for line in (data / name / "soba-seed0" / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    ]
    assert len(steps[0]) == len(set(steps[0]))
    assert set(steps[1]) <= set(steps[0])


BAD_INPUT = {
    "missing file": ({"data__generic": "nowhere.txt"}, ["nowhere.txt", "does not exist"]),
    "empty file": ({"data__generic": "EMPTY"}, ["empty.txt is empty"]),
    "not UTF-8": ({"data__generic": "LATIN"}, ["latin.txt", "line 2"]),
    "small specific set": ({"weights__specific_batch_size": 5000}, ["A batch of 5000 rows", "specific"]),
    "b > B": ({"big_batch_size": 2}, ["--big-batch-size 2 is smaller than --batch-size 4"]),
    "unknown method": ({"compare": "uniform,magic"}, ['"magic"', "choose from all, uniform, mixing"]),
    "unknown data set": ({"data__generic": "tfds:no_such_set"}, ["no_such_set"]),
    "unwritable directory": ({"run_dir": "BELOW"}, ["Cannot write to the run directory", "give another --run-dir"]),
    "more blocks than there are": (
        {"method": "soba", "weights__probe_blocks": 9},
        ["--weights.probe-blocks 9", "the model has 2 blocks"],
    ),
    "all rows specific": (
        {"method": "mixing", "weights__mixing_fraction": 1.0},
        ["--weights.mixing-fraction 1.0 of --batch-size 4"],
    ),
    "no rows before selection": (
        {"method": "contrastive", "weights__contrastive_start": 0.01},
        ["--weights.contrastive-start 0.01 leaves 0 of 12 steps"],
    ),
    "too few rows after selection": (
        {"method": "contrastive", "weights__contrastive_rows": 10},
        ["--weights.contrastive-fraction 0.1 of 10 scored rows keeps fewer than the --batch-size 4"],
    ),
    "more than all rows after selection": (
        {"method": "contrastive", "weights__contrastive_fraction": 1.5},
        ["--weights.contrastive-fraction 1.5 must lie in (0, 1]"],
    ),
    "schedule that ends too early": ({"schedule_steps": 6}, ["--schedule-steps 6", "--steps 12"]),
    "processes without an address": ({"processes": 2, "process": 0}, ["--processes needs --coordinator"]),
    "address without processes": ({"coordinator": "host:1"}, ["--coordinator host:1 needs --processes"]),
    "data on devices that share a state": (
        {"resident": "always", "shard_state": None},
        ["--resident always keeps everything on each device of one process: leave it or --shard-state away"],
    ),
    "data on the devices of two hosts": (
        {"resident": "always", "coordinator": "host:1", "processes": 2, "process": 0},
        ["--resident always keeps everything on each device of one process: leave it or --coordinator away"],
    ),
    "damaged weights": ({"method": "frozen", "weights__frozen_from": "BROKEN"}, ["weights.npz is damaged"]),
    "one row alone": ({"method": "soba", "batch_size": 1}, ["batch_size=1 leaves one row to learn the weights from"]),
    "no scores": (
        {"method": "contrastive", "weights__contrastive_scores": "nowhere.safetensors"},
        [
            "There are no scores at nowhere.safetensors: give --weights.contrastive-scores the contrastive_scores.safetensors"
        ],
    ),
    "budget of unknown seconds": (
        {"compare": "soba", "same_seconds": None},
        ["--same-seconds takes uniform's seconds"],
    ),
    "seconds for nothing": (
        {"budget_seconds": 5.0},
        ["--budget-seconds 5.0 counts only with --same-seconds: add it"],
    ),
    "trial steps without trials": ({"trial_steps": 7}, ["--trial-steps 7 counts only with --trials"]),
    "too few trials": ({"trials": -1}, ["--trials -1 must be at least 0"]),
    "no steps": ({"steps": 0}, ["--steps 0 must be at least 1"]),
    "negative seed": ({"seed": -1}, ["--seed -1"]),
    "no seeds": ({"seeds": 0}, ["--seeds 0 must be at least 1"]),
    "frozen without weights": ({"method": "frozen"}, ["--weights.frozen-from"]),
    "nothing to evaluate": ({"eval_only": None}, ["holds no checkpoint to evaluate"]),
}


def test_what_the_preset_adds_gives_way_to_what_is_asked_for() -> None:
    def settings(method: str, scan_layers: bool = False, **weights: Any) -> dict[str, Any]:
        return settings_of(Config(model=ModelConfig(scan_layers=scan_layers), weights=MethodConfig(**weights)), method)

    assert settings("dds")["probe_every"] == 2
    assert settings("dds", update_every=3)["probe_every"] == 0
    assert settings("dds", average_specific=0.0)["probe_every"] == 0
    assert settings("dds", average_specific=0.0, probe_every=2)["probe_every"] == 2
    assert settings("soba", scan_layers=True)["probe_blocks"] == 0
    with pytest.raises(UserError, match=r"does not go with --model\.scan-layers"):
        last_blocks(1, TransformerConfig(2, 8, 2, 16, scan_layers=True))


@pytest.mark.parametrize(
    "given",
    [
        {"alpha_batch": "uniform"}, {"estimator": "score"}, {"preset": "paper", "estimator": "score"},
        {"update_every": 4}, {"probe_every": 4}, {"probe_every": 1}, {"filter": "top_fraction"}, {"filter": "threshold"},
    ],
)  # fmt: skip
def test_one_set_of_flags_serves_all_methods(data: Path, given: dict[str, Any]) -> None:
    """What a method has no use for does not keep a comparison from starting."""
    config = Config(
        batch_size=4, big_batch_size=16, length=16, weights=MethodConfig(**given),
        data=DataConfig(generic=str(data / "generic.txt"), specific=str(data / "specific"), cache_dir=data / "cache"),
    )  # fmt: skip
    corpora = load_corpora(config)
    for method in ALL:
        checks.check(config, method, corpora)
    for method in ("mixing", "classifier"):  # what they have no use for is recorded as it was
        with_softmax = dataclasses.replace(config, weights=MethodConfig(alpha_batch="uniform", estimator="softmax"))
        assert settings_of(with_softmax, method)["alpha_batch"] == "uniform"
    dds = settings_of(config, "dds")
    assert all(dds[name] == value for name, value in given.items() if name != "preset"), "where it is of use, it counts"


def test_an_estimator_brings_its_rate() -> None:
    def rate(method: str = "soba", **weights: Any) -> float:
        return settings_of(Config(weights=MethodConfig(**weights)), method)["weight_learning_rate"]

    assert (rate(), rate(estimator="score")) == (1e-2, 1e-2)
    assert (rate(estimator="softmax"), rate(filter="top_k"), rate("warm_soba", filter="top_k")) == (1e-3, 1e-3, 1e-3)
    assert rate(estimator="softmax", weight_learning_rate=0.5) == rate(weight_learning_rate=0.5) == 0.5
    for method in ("classifier", "frozen"):  # no estimator; this rate is the classifier's own
        assert rate(method, filter="top_fraction") == rate(method, estimator="softmax") == 1e-2
    assert rate("meta_weight_net") == rate("meta_weight_net", estimator="softmax") == 1e-2, "tuned with softmax"
    assert (rate(preset="paper"), rate(preset="paper", estimator="score")) == (1e-3, 1e-2)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = BAD_INPUT[case]
    (data / "empty.txt").touch()
    (data / "latin.txt").write_bytes(b"good line\nbad \xe9\xe8 line\n")
    (data / "broken").mkdir()
    (data / "broken" / "weights.npz").write_bytes(b"PK\x03\x04 cut off")
    paths = {
        "EMPTY": data / "empty.txt",
        "LATIN": data / "latin.txt",
        "BELOW": data / "generic.txt" / "run",
        "BROKEN": data / "broken",
    }
    chosen = {name: paths.get(value, value) for name, value in given.items() if value is not None}  # pyright: ignore
    more = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    with pytest.raises(SystemExit) as stop:
        call(data, *more, **{"compare": "soba", **chosen})
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    message = next(line for line in error.splitlines() if line.startswith("error: "))
    assert "Traceback" not in error
    for word in words:
        assert word in message


def test_other_settings_in_a_run_directory(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, method="uniform")
    with pytest.raises(SystemExit):
        call(data, method="uniform", learning_rate=0.5)
    assert "learning_rate" in capsys.readouterr().err


def test_a_diverging_run_names_the_step_and_keeps_the_last_good_checkpoint(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(data, method="uniform", learning_rate=1e38, steps=400, warmup=300)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "at step" in error or "after step" in error
    kept = [path.name for path in (data / "run" / "uniform-seed0" / "checkpoints").glob("[0-9]*")]
    assert "checkpoint" in error
    assert all(int(step) < 400 for step in kept)


def test_numbers_out_of_range_are_named_before_anything_is_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value, least in (
        ("steps", 0, "at least 1"), ("seed", -1, "at least 0"), ("evaluate-rows", 0, "at least 1"),
        ("warmup", -1, "at least 0"), ("budget-seconds", "nan", "at least 0"), ("learning-rate", "nan", "positive"),
        ("model.weighting-width", 0, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            call(data, method="uniform", data__generic="nowhere", **{flag.replace(".", "__").replace("-", "_"): value})
        error = capsys.readouterr().err
        assert f"--{flag} {value}" in error
        assert least in error


def test_evaluation_only_of_nothing_leaves_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(data, "--eval-only", method="uniform", run_dir=data / "typo")
    assert "holds no checkpoint to evaluate: check --run-dir" in capsys.readouterr().err
    assert not (data / "typo").exists()


def test_a_damaged_result_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data / "run" / "uniform-seed0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"method": "unif')
    with pytest.raises(SystemExit):
        call(data, method="uniform")
    assert f"{file} is damaged" in capsys.readouterr().err


def test_the_report_tells_methods_apart(data: Path) -> None:
    rows = [{"step": 4, "seconds": 1.0, "specific_valid_loss": 2.0, "effective_sample_size": 4.0}]
    config = Config(run_dir=data / "run", data=DataConfig(generic="g", specific="s"))
    summaries = []
    for method in ("uniform", "soba"):
        folder = data / "run" / f"{method}-seed0"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
        settings = settings_dict(config, method, 0) | {"learning_rate": {"uniform": 0.5, "soba": 0.25}[method]}
        (folder / "config.yaml").write_text(json.dumps({"format": 1, **settings}, default=str))
        summaries.append({"method": method, "seed": 0, "specific_valid_loss": 2.0, "effective_sample_size": 4.0})
    files = DataConfig(generic=str(data / "generic.txt"), specific=str(data / "specific"), cache_dir=data / "cache")
    text = comparison.compare(config, summaries, load_corpora(Config(length=16, data=files)))
    assert [row["effective_sample_size"] for row in results(data)] == [None, 4.0]
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:4]] == ["–", "4"]
    assert "nats per byte" in text
    report = (data / "run" / "report.html").read_text()
    for name, value in (("steps", 3000), ("uniform: learning_rate", 0.5), ("soba: learning_rate", 0.25)):
        assert f"<td>{name}</td><td>{value}</td>" in report
    assert "<td>soba: weights.tracker</td>" in report
    assert "<td>seed</td>" not in report


def test_the_report_shows_documents_of_the_best_network_of_text(data: Path) -> None:
    config = Config(run_dir=data / "run")
    rows = [
        {"method": method, "seed": 0, "specific_valid_loss": loss}
        for method, loss in (("uniform", 1.0), ("meta_weight_net", 1.5), ("soba", 2.0), ("dds", 3.0))
    ]
    assert comparison._documents(config, rows) == {}  # pyright: ignore[reportPrivateUsage]
    for method in ("soba", "dds"):
        (data / "run" / f"{method}-seed0").mkdir(parents=True)
        documents = json.dumps({"highest": [[1.0, "", f"liked by {method}"]]})
        (data / "run" / f"{method}-seed0" / "documents.json").write_text(documents)
    found = comparison._documents(config, rows)  # pyright: ignore[reportPrivateUsage]
    assert [document.text for document in found["highest"]] == ["liked by soba"]


def test_the_rate_of_the_weights_grows_over_theta_updates() -> None:
    settings = {"weight_learning_rate": 0.01, "weight_warmup": 40, "update_every": 4, "weight_decay": 0.0}
    optimizer, weights = build_weight_optimizer(settings), jnp.zeros(1)
    state, moves = optimizer.init(weights), []
    for _ in range(15):
        updates, state = optimizer.update(jnp.ones(1), state, weights)
        moves.append(-np.asarray(updates).item())
    expected = [0.01 * min(i / 10, 1) for i in range(15)]  # Adam moves by its rate where the gradient never changes
    np.testing.assert_allclose(moves, expected, rtol=1e-3, atol=1e-9)
    with pytest.raises(UserError, match=r"--weights\.weight-warmup -1 must be at least 0"):
        build_weight_optimizer(settings | {"weight_warmup": -1})


@pytest.mark.slow
def test_a_warm_start_begins_with_the_classifier(data: Path) -> None:
    kept, still = {}, {"weights__weight_warmup": 10**6, "weights__weight_learning_rate": 0.01}
    for method in ("soba", "warm_soba", "classifier"):
        call(data, method=method, run_dir=data / method, **still)
        with np.load(data / method / f"{method}-seed0" / "weights.npz") as leaves:
            kept[method] = [leaves[name] for name in leaves.files]
    distance = {
        method: sum(float(np.abs(a - b).max()) for a, b in zip(kept[method], kept["classifier"], strict=True))
        for method in ("soba", "warm_soba")
    }
    assert distance["warm_soba"] < 0.05 * distance["soba"], distance


def test_specific_candidates_stand_in_every_big_batch(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = load_corpora(
        Config(length=16, data=DataConfig(str(data / "generic.txt"), str(data / "specific"), cache_dir=data / "cache"))
    )
    weights = MethodConfig(specific_candidates=3)
    config = Config(length=16, batch_size=4, big_batch_size=16, weights=weights)
    for method, count in (("soba", 3), ("classifier", 3), ("uniform", 0), ("meta_weight_net", 0)):
        batch = build_loaders(config, method, 0, corpora)[0].batch(5)
        texts = [row[:n].tobytes().decode() for row, n in zip(batch["tokens"], batch["length"], strict=True)]
        assert (batch["id"] == -1).sum() == count
        assert len(texts) == (16 if count else 4)
        if count:
            specific = [text for text, i in zip(texts, batch["id"], strict=True) if i < 0]
            assert all(text.upper() == text for text in specific)
    with pytest.raises(SystemExit):
        call(data, method="soba", weights__specific_candidates=16)
    assert "--weights.specific-candidates 16 of --big-batch-size 16" in capsys.readouterr().err
