"""The analyses end to end, as a user calls them, at tiny sizes."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from experiments.language_modeling.config import DENSE, METHODS, PLAIN, DataConfig, MethodConfig, settings_of
from experiments.language_modeling.run import run
from experiments.language_modeling.weights import DIGEST, known_digest

from bilevel.nn.transformer import SIZES
from bilevel.training.run_dir import read_settings
from experiments import cli
from experiments.analyses.__main__ import command
from experiments.analyses.acceleration import Acceleration
from experiments.analyses.analysis import LEARNING, Record, Run, record_of
from experiments.analyses.curriculum import Curriculum, order_of
from experiments.analyses.filters import Filters, count_distinct, distinct_share
from experiments.analyses.multi_task import MultiTask
from experiments.analyses.snapshots import Snapshots
from experiments.analyses.transfer import Transfer, seconds_to
from experiments.diagnose.__main__ import main as diagnose
from experiments.diagnose.config import DiagnoseConfig
from experiments.language_modeling import build

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "old", "town", "people", "ran"]
STEPS = 8


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, width in (("xs", 32), ("small", 48)):
        tiny = dataclasses.replace(SIZES[name], layers=1, width=width, heads=2, feed_forward=width)
        monkeypatch.setitem(SIZES, name, tiny)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Generic text, a third of it in capitals, a third with digits; two specific sets like those."""
    rng = np.random.default_rng(0)
    makers = {"plain": str, "capitals": str.upper, "digits": lambda text: text.replace("a", "4").replace("e", "3")}

    def lines(kind: str, count: int) -> str:
        return "\n".join(makers[kind](" ".join(rng.choice(WORDS, 8))) for _ in range(count)) + "\n"

    (tmp_path / "generic.txt").write_text("".join(lines(kind, 100) for kind in makers))
    for name in ("capitals", "digits"):
        (tmp_path / name).mkdir()
        for part, count in (("train", 60), ("valid", 20), ("test", 20)):
            (tmp_path / name / f"{part}.txt").write_text(lines(name, count))
    return tmp_path


def call(data: Path, analysis: object, *more: object, **given: object) -> None:
    flags: dict[str, object] = {
        "steps": STEPS,
        "length": 16,
        "batch-size": 4,
        "big-batch-size": 16,
        "warmup": 2,
        "log-every": 2,
        "evaluate-every": 4,
        "checkpoint-every": 4,
        "run-dir": data / "run",
        "data.generic": data / "generic.txt",
        "data.specific": data / "capitals",
        "data.cache-dir": data / "cache",
        "weights.probe-every": 0,
        **{name.replace("__", ".").replace("_", "-"): value for name, value in given.items()},
    }
    command(
        [str(analysis), *(str(x) for name, value in flags.items() for x in (f"--{name}", value)), "--no-progress"]
        + [str(x) for x in more]
    )


def results(data: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((data / "run" / f"{name}.json").read_text())


def check_files(data: Path, name: str, printed: str) -> None:
    assert (data / "run" / f"{name}.md").read_text().strip() in printed
    assert "<svg" in (data / "run" / f"{name}.svg").read_text()
    for row in results(data, name):
        for loss in ("specific_valid_loss", "specific_test_loss", "generic_loss"):
            assert math.isfinite(row[loss]), loss


def contents(file: Path) -> set[bytes]:
    return {x.tobytes() for x in arrays(file)}


def arrays(file: Path) -> list[np.ndarray]:
    with np.load(file) as stored:
        return [stored[name] for name in stored.files]


def config(kind: Any, data: Path, **given: Any) -> Any:
    return kind(
        steps=STEPS,
        length=16,
        batch_size=4,
        big_batch_size=16,
        warmup=2,
        run_dir=data / "run",
        progress=False,
        data=DataConfig(str(data / "generic.txt"), str(data / "capitals"), cache_dir=data / "cache"),
        weights=MethodConfig(probe_every=0),
        **given,
    )


@pytest.mark.slow
def test_curriculum(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, "curriculum", snapshots=4)
    printed = capsys.readouterr().out
    check_files(data, "curriculum", printed)
    assert [row["method"] for row in results(data, "curriculum")] == ["soba", "final", "shuffled", "replayed"]
    assert printed.startswith("| trajectory | seeds |")
    folder = data / "run" / "soba-seed0"
    snapshots = [path.name for path in sorted((folder / "snapshots").iterdir())]
    assert snapshots == [f"{step:08d}.npz" for step in (0, 2, 4, 6, 8)]
    last = contents(folder / "snapshots" / "00000008.npz")
    assert last != contents(folder / "snapshots" / "00000000.npz")
    assert last == contents(folder / "weights.npz")
    assert last == contents(data / "run" / "final" / "frozen-seed0" / "weights.npz")
    with pytest.raises(SystemExit):
        call(data, "curriculum", snapshots=8)
    assert "snapshot_every was 2, now 1" in capsys.readouterr().err
    (data / "run" / "replayed" / "frozen-seed0" / "result.json").unlink()
    (folder / "snapshots" / "00000004.npz").unlink()
    with pytest.raises(SystemExit):
        call(data, "curriculum", snapshots=4)
    assert "soba-seed0 lacks the snapshot 00000004.npz of its weights: give" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trajectory_with_all_steps_is_replayed_exactly(data: Path) -> None:
    analysis = config(Curriculum, data, snapshots=STEPS)
    corpora = analysis.corpora()
    losses = {}
    for planned in analysis.runs(0):
        recorder = Snapshots(planned.directory / "used", 1)
        variant = planned.variant
        if planned.method == "frozen":
            variant = variant._replace(on_state=recorder.save, state_every=1)
        summary = run(planned.config, planned.method, 0, corpora, variant)
        assert summary is not None
        losses[planned.label] = summary["specific_test_loss"]
    kept = data / "run" / "soba-seed0" / "snapshots"
    files = {step: (kept / f"{step:08d}.npz").read_bytes() for step in range(STEPS + 1)}
    assert len(set(files.values())) > STEPS // 2

    def used(label: str) -> list[bytes]:
        folder = data / "run" / label / "frozen-seed0" / "used"
        return [(folder / f"{step:08d}.npz").read_bytes() for step in range(1, STEPS + 1)]

    assert used("replayed") == [files[step] for step in range(STEPS)]
    assert used("final") == [files[STEPS]] * STEPS
    assert used("shuffled") == [files[step] for step in order_of("shuffled", STEPS, 0)]
    assert sorted(used("shuffled")) == sorted(used("replayed")) != used("shuffled")
    # the same batches were picked by the same weights; only the rounding of another program differs
    assert losses["replayed"] == pytest.approx(losses["soba"], rel=1e-4)
    assert losses["shuffled"] != pytest.approx(losses["soba"], rel=1e-4)


@pytest.mark.parametrize("steps", [1, 8, 5000])
def test_shuffling_is_a_permutation_of_the_steps(steps: int) -> None:
    shuffled = order_of("shuffled", steps, 3)
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(steps))
    np.testing.assert_array_equal(shuffled, order_of("shuffled", steps, 3))
    np.testing.assert_array_equal(order_of("replayed", steps, 3), np.arange(steps))
    if steps > 1:
        assert (shuffled != order_of("shuffled", steps, 4)).any()


@pytest.mark.slow
def test_a_stopped_learner_continues_with_the_same_snapshots(data: Path) -> None:
    whole = config(Curriculum, data, snapshots=4, checkpoint_every=3)
    corpora = whole.corpora()

    def learn(analysis: Any, steps: int) -> Path:
        planned: Run = next(iter(analysis.runs(0)))
        shorter = dataclasses.replace(planned.config, steps=steps, schedule_steps=STEPS)
        run(shorter, planned.method, 0, corpora, planned.variant)
        return planned.directory

    first = learn(whole, STEPS)
    second = learn(dataclasses.replace(whole, run_dir=data / "again"), 3)
    snapshots = second / "snapshots"
    for path in snapshots.glob("*"):
        if path.name > "00000003":
            path.unlink()
    for name in ("config.yaml", "result.json"):
        (second / name).unlink()
    learn(dataclasses.replace(whole, run_dir=data / "again"), STEPS)
    found = {path.name: path.read_bytes() for path in snapshots.iterdir()}
    assert found == {path.name: path.read_bytes() for path in (first / "snapshots").iterdir()}


@pytest.mark.slow
def test_filters_and_what_is_finished_is_not_done_again(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: tuple[object, ...] = ("filters", "--filters", "importance", "uniform", "--weights.weight-learning-rate", 1)
    call(data, *flags)
    before = results(data, "filters")
    finished = data / "run" / "importance" / "soba-seed0" / "metrics.jsonl"
    written = finished.stat().st_mtime_ns
    (data / "run" / "uniform" / "uniform-seed0" / "result.json").unlink()  # as if killed after the last checkpoint
    capsys.readouterr()
    call(data, *flags)
    check_files(data, "filters", capsys.readouterr().out)
    assert finished.stat().st_mtime_ns == written
    importance, uniform = results(data, "filters")
    assert (importance["method"], uniform["method"]) == ("importance", "uniform")
    assert importance == before[0]
    assert uniform["specific_test_loss"] == before[1]["specific_test_loss"]
    assert uniform["distinct_rows"] == 100
    assert uniform["effective_sample_size"] is None
    assert 25 <= importance["distinct_rows"] < 100


def test_a_run_for_each_filter(data: Path) -> None:
    planned = list(config(Filters, data).runs(0))
    assert [p.label for p in planned] == ["gumbel_top_k", "importance", "top_k", "uniform"]
    assert [settings_of(p.config, p.method)["filter"] for p in planned[:3]] == [p.label for p in planned[:3]]
    assert [p.method for p in planned] == ["soba", "soba", "soba", "uniform"]
    assert len({p.directory for p in planned}) == 4


@pytest.mark.parametrize("method", LEARNING)
def test_methods_that_learn_a_network_of_text(method: str, data: Path) -> None:
    config(Filters, data, method=method).check()


def test_the_methods_that_learn_are_all_there() -> None:
    assert set(LEARNING) == set(METHODS) - {*PLAIN, *DENSE, "classifier", "frozen"}


def test_distinct_rows() -> None:
    ids = np.array([3, 1, 2, 0, 5, 5, 5, 5, 2, 7, 2, 7], np.int32)
    assert distinct_share(ids, 4) == pytest.approx((1 + 1 / 4 + 2 / 4) / 3)
    counter = count_distinct(6, lambda ids, step: {"share/x": 0.25})
    assert counter(ids, 2) == {"share/x": 0.25, "distinct_rows": pytest.approx(100 * (5 / 6 + 3 / 6) / 2)}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_transfer(seeds: int, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, "transfer", small="xs", large="small", seeds=seeds)
    printed = capsys.readouterr().out
    check_files(data, "transfer", printed)
    assert (" ± " in printed) == (seeds > 1)
    assert [row["seed"] for row in results(data, "transfer")] == [seed for seed in range(seeds) for _ in range(4)]
    rows = {row["method"]: row for row in results(data, "transfer")}
    assert list(rows) == ["xs: soba", "small: uniform", "small: soba", "small: weights from xs"]
    folders = ["xs/soba-seed0", "small/uniform-seed0", "small/soba-seed0", "small/frozen-seed0"]
    settings = [read_settings(data / "run" / folder) for folder in folders]
    assert [s["model"]["size"] for s in settings] == ["xs", "small", "small", "small"]
    learned, own, reused = (arrays(data / "run" / folders[i] / "weights.npz") for i in (0, 2, 3))
    for a, b in zip(learned, reused, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(learned, own, strict=True))
    assert rows["small: uniform"]["seconds_to_baseline"] > 0
    assert "seconds_to_baseline" not in rows["xs: soba"]


@pytest.mark.slow
def test_an_analysis_may_move(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"small": "xs", "large": "small"}
    call(data, "transfer", **sizes)
    (data / "run").rename(data / "moved")
    call(data, "transfer", **sizes, run_dir=data / "moved")
    frozen = data / "moved" / "small" / "frozen-seed0"
    settings = read_settings(frozen)
    assert settings["weights"]["frozen_from"] == str(data / "moved" / "xs" / "soba-seed0")
    del settings["weights"][DIGEST]  # as if begun before it was recorded
    (frozen / "config.yaml").write_text(json.dumps({"format": 1, **settings}))
    (data / "moved").rename(data / "again")
    call(data, "transfer", **sizes, run_dir=data / "again")
    assert json.loads((data / "again" / "transfer.json").read_text())[3]["method"] == "small: weights from xs"


def test_weights_are_known_wherever_they_lie(tmp_path: Path) -> None:
    def learned(name: str, value: float) -> Path:
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "weights.npz", leaf_0=np.full(3, value, np.float32))
        return tmp_path / name

    one, copy, other = learned("one", 1.0), learned("copy", 1.0), learned("other", 2.0)
    run_dir = tmp_path / "frozen"
    run_dir.mkdir()

    def record(**weights: object) -> None:
        (run_dir / "config.yaml").write_text(json.dumps({"format": 1, "weights": weights}))

    found = known_digest(one, run_dir)
    assert found == known_digest(copy, run_dir) != known_digest(other, run_dir)
    record(frozen_from=str(one))
    assert known_digest(one, run_dir) is known_digest(copy, run_dir) is None
    assert known_digest(other, run_dir) not in (None, found)
    record(frozen_from=str(tmp_path / "elsewhere"))
    assert known_digest(other, run_dir) is None
    record(frozen_from=str(one), frozen_digest=found)
    assert known_digest(copy, run_dir) == known_digest(tmp_path / "gone", run_dir) == found
    assert known_digest(other, run_dir) not in (None, found)


def test_what_precedes_training_counts(data: Path) -> None:
    analysis = config(Transfer, data, small="xs", large="small", method="warm_soba")
    records = []
    for planned, before in zip(analysis.runs(0), (5.0, 0.0, 7.0, 0.0), strict=True):
        planned.directory.mkdir(parents=True)
        rows = [{"step": i, "seconds": i / 4, "specific_valid_loss": 3.0 - i / 4} for i in (4, 8)]
        (planned.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records.append(record_of(planned, {"preparation_seconds": before} if before else {}))
    assert [row.get("seconds_to_baseline") for row in analysis.results(records)] == [None, 2.0, 9.0, 2.0]
    assert [record.metrics[0]["seconds"] for record in records] == [6.0, 1.0, 8.0, 1.0]


@pytest.mark.parametrize("kind", [Curriculum, Filters, Transfer])
def test_fine_tuning_is_in_the_table(kind: Any, data: Path) -> None:
    analysis = config(kind, data, finetune_steps=5)
    losses = {"specific_test_loss": 2.0, "seconds": 1.0}
    plain, tuned = (
        {"method": "x", "seed": 0, **losses, **more} for more in ({}, {"finetuned_specific_test_loss": 1.5})
    )
    assert "fine-tuned" not in analysis.table([plain])
    text = analysis.table([tuned])
    assert "| test loss, fine-tuned |" in text
    assert "| 1.500 |" in text


def accelerate(data: Path, *more: object) -> None:
    call(data, "acceleration", *more, rows=16, pairs=2, batch_rows=8)


@pytest.mark.slow
def test_acceleration(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate(data, *sets(data))
    printed = capsys.readouterr().out
    assert (data / "run" / "acceleration.md").read_text().strip() in printed
    picture = (data / "run" / "acceleration.svg").read_text()
    assert "<svg" in picture
    rows = results(data, "acceleration")
    assert [row["specific_set"] for row in rows] == ["capitals", "digits"]
    for row, line in zip(rows, printed.splitlines()[2:], strict=False):
        folder = data / "run" / row["specific_set"]
        uniform, soba = (json.loads((folder / f"{m}-seed0" / "result.json").read_text()) for m in ("uniform", "soba"))
        assert row["gain"] == uniform["specific_test_loss"] - soba["specific_test_loss"]
        assert f"| {100 * row['sar']:.1f} ± {100 * row['sar_error']:.1f} % |" in line
        assert row["specific_set"] in picture
    measured = data / "run" / "digits" / "uniform-seed0" / "acceleration.json"
    written = measured.stat().st_mtime_ns
    (data / "run" / "capitals" / "uniform-seed0" / "acceleration.json").unlink()
    accelerate(data, *sets(data))  # what is missing is measured again, on the same parameters
    assert results(data, "acceleration") == rows
    assert measured.stat().st_mtime_ns == written
    diagnosed = data / "diagnosed"
    sizes = ("--rows", "16", "--pairs", "2", "--batch-rows", "8", "--run-dir", str(diagnosed))
    checkpoint = ("--checkpoint", str(data / "run" / "digits" / "uniform-seed0"))
    cli.run(DiagnoseConfig, diagnose, [*sizes, *checkpoint])
    (found,) = json.loads((diagnosed / "diagnose.json").read_text())["measurements"]
    assert (found["sar"], found["gar_error"]) == pytest.approx((rows[1]["sar"], rows[1]["gar_error"]))


def test_rates_over_seeds() -> None:
    analysis = Acceleration(method="dds")
    numbers = {"sar": 0.6, "sar_error": 0.03, "gar": 0.5, "gar_error": 0.04}
    records = [
        Record(Run("", analysis.settings(), method, seed), {"specific_test_loss": loss + seed, **numbers}, [])
        for seed in (0, 1)
        for method, loss in (("uniform", 2.0), ("dds", 1.5))
    ]
    (line,) = analysis.table(analysis.results(records)).splitlines()[2:3]
    losses = "2.500 ± 0.707 | 2.000 ± 0.707 | 0.500 ± 0.000"
    assert line == f"| python_topics | 2 | {losses} | 60.0 ± 2.1 % | 50.0 ± 2.8 % |"


def test_seconds_to_a_loss() -> None:
    metrics: list[dict[str, Any]] = [
        {"step": i, "seconds": 10.0 * i, **({"specific_valid_loss": 3.0 - i / 4} if i % 2 else {})} for i in range(8)
    ]
    assert seconds_to(2.5, metrics) == 30
    assert seconds_to(3.0, metrics) == 10
    assert seconds_to(1.0, metrics) is None


def sets(data: Path) -> list[object]:
    return ["--specific-sets", data / "capitals", data / "digits"]


@pytest.mark.slow
def test_multi_task(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(data, "multi_task", *sets(data), finetune_steps=60, weights__classifier_steps=20)
    printed = capsys.readouterr().out
    check_files(data, "multi_task", printed)
    assert "| average test loss | capitals | digits | average test loss, fine-tuned |" in printed
    rows = results(data, "multi_task")
    assert [row["method"] for row in rows] == ["uniform", "classifier", "soba"]
    for row in rows:
        for prefix in ("", "finetuned_"):
            each = [row[f"{prefix}{name}/test_loss"] for name in ("capitals", "digits")]
            assert each[0] != each[1]
            assert row[f"{prefix}specific_test_loss"] == pytest.approx(np.mean(each))
        assert row["finetuned_specific_valid_loss"] < row["specific_valid_loss"]
        assert row["finetuned_capitals/test_loss"] < row["capitals/test_loss"]
        assert row["finetuned_digits/test_loss"] < row["digits/test_loss"]


@pytest.mark.slow
def test_a_run_that_diverged_is_a_dash(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"compare": "soba,uniform", "finetune_steps": 0, "steps": 4, "weights__tracker": "sgd"}
    for _ in range(2):
        with pytest.raises(SystemExit):
            call(data, "multi_task", *sets(data), **given, weights__tracker_learning_rate=1e38)
        printed = capsys.readouterr()
        assert "| soba | 0 of 1 | – |" in printed.out
        assert "| uniform | 1 |" in printed.out
        assert "soba-seed0 diverged" in printed.err
        assert "1 of the runs diverged and are dashes" in printed.err
        assert (data / "run" / "multi_task.md").read_text().strip() in printed.out
    assert "<svg" in (data / "run" / "multi_task.svg").read_text()


def test_specific_batches_come_from_the_tasks_as_often_as_asked(data: Path) -> None:
    analysis = config(
        MultiTask, data, specific_sets=(str(data / "capitals"), str(data / "digits")), task_weights=(3.0, 1.0)
    )
    loader = build.build_loaders(analysis.settings(), "soba", 0, analysis.corpora())[1]
    count, steps = 0, 1000
    for step in range(steps):
        tokens = loader.batch(step)["tokens"]
        upper = [bytes(row).strip(b"\0").isupper() for row in tokens]
        assert len(set(upper)) == 1  # a batch is of one task
        count += upper[0]
    assert abs(count - 0.75 * steps) < 4.5 * math.sqrt(steps * 0.75 * 0.25)


def test_a_set_called_specific_is_not_the_average() -> None:
    analysis = MultiTask(specific_sets=("a/specific.txt", "b/other.txt"))
    assert list(analysis.columns.values())[1:4] == ["average test loss", "specific", "other"]
    summary = {"specific_test_loss": 2.0, "task_test_losses": {"specific": 1.0, "other": 3.0}}
    planned = Run("soba", analysis.settings(), "soba", 0)
    (row,) = analysis.results([Record(planned, summary, [])])
    assert [row[name] for name in list(analysis.columns)[1:4]] == [2.0, 1.0, 3.0]


def test_names_of_the_sets() -> None:
    assert MultiTask(specific_sets=("x/law.txt.gz", "y/news/", "python:topics")).names == [
        "law",
        "news",
        "python:topics",
    ]
    assert MultiTask(specific_sets=("x/news", "y/news")).names == ["x/news", "y/news"]


BAD = {
    "no steps": (["filters"], {"steps": 0}, "--steps 0 must be at least 1"),
    "no seeds": (["filters"], {"seeds": 0}, "--seeds 0 must be at least 1"),
    "evaluation": (["transfer", "--eval-only"], {}, "--eval-only is not for analyses"),
    "a search": (["filters", "--trials", "2"], {}, "--trials is not for analyses"),
    "several sets": (["filters", "--specific-sets", "a", "b"], {}, "--specific-sets is not for analyses"),
    "several hosts": (["transfer"], {"coordinator": "host:1"}, "--coordinator is not for analyses"),
    "a method that learns nothing": (["curriculum"], {"method": "classifier"}, "--method classifier does not learn"),
    "several methods": (["filters"], {"compare": "soba,dds"}, "--compare soba,dds is not for this analysis"),
    "no snapshots": (["curriculum"], {"snapshots": 0}, "--snapshots 0 must be at least 1"),
    "resident": (
        ["curriculum", "--resident", "always"],
        {},
        "--resident always does not go with replaying",
    ),
    "a filter twice": (["filters", "--filters", "top_k", "top_k"], {}, "--filters top_k top_k: name"),
    "specific rows among the big batch": (
        ["filters"],
        {"weights__specific_candidates": 2},
        "--weights.specific-candidates does not go with this analysis",
    ),
    "batches that are too large": (["acceleration"], {"batch_rows": 5000}, "--batch-rows 5000"),
    "one pair": (["acceleration"], {"pairs": 1}, "--pairs 1 must be at least 2"),
    "two sets of a name": (
        ["acceleration", "--specific-sets", "a/x.txt", "b/x.txt"],
        {},
        '--specific-sets has two sets named "x"',
    ),
    "gain of fine-tuning": (["acceleration"], {"finetune_steps": 5}, "--finetune-steps 5 is not for this analysis"),
    "one size": (["transfer"], {"small": "small", "large": "small"}, "give two sizes that differ"),
    "no sets": (["multi_task"], {}, "--specific-sets names 0 specific sets: give at least two"),
    "a set twice": (["multi_task", "--specific-sets", "a", "a"], {}, "names a set twice"),
    "a weight too few": (
        ["multi_task", "--specific-sets", "CAPITALS", "DIGITS", "--task-weights", "1"],
        {},
        "--task-weights has 1 numbers for 2 specific sets",
    ),
    "a negative weight": (
        ["multi_task", "--specific-sets", "CAPITALS", "DIGITS", "--task-weights", "2", "-1"],
        {},
        "The task weights are [2.0, -1.0] for 2 data sets (capitals, digits)",
    ),
    "a setting of a later run": (
        ["filters", "--filters", "uniform", "top_fraction"],
        {"weights__top_fraction": 2.0},
        "top_fraction: ",
    ),
    "a setting of a later method": (
        ["multi_task", "--specific-sets", "CAPITALS", "DIGITS", "--compare", "uniform,mixing"],
        {"weights__mixing_fraction": 1.5},
        "mixing: --weights.mixing-fraction 1.5",
    ),
    "a missing set": (["multi_task", "--specific-sets", "CAPITALS", "nowhere"], {}, "nowhere does not exist"),
    "frozen weights": (
        ["multi_task", "--specific-sets", "CAPITALS", "DIGITS"],
        {"method": "frozen"},
        "The method frozen is not for this analysis",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_sentence(case: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name, *more), given, words = BAD[case]
    folders = {"CAPITALS": data / "capitals", "DIGITS": data / "digits"}
    with pytest.raises(SystemExit) as stop:
        call(data, name, *(folders.get(x, x) for x in more), **given)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(data.rglob("metrics.jsonl")), "nothing was trained"
