"""RLSampler in the image-classification experiment: trained, resumed, replayed and transferred; what it drew."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from experiments.image_classification.config import Config
from experiments.image_classification.data import prepared
from experiments.image_classification.faults import load_data
from image_toy import STEPS, call, config_of, final_state, killed_and_whole, metrics_of, quarters, results, stop_after

from bilevel.training import read_metrics, save_sampler, save_sequence
from experiments.image_classification import drawn, sampled

SMALL = {"policy_every": 4, "reward_every": 2, "summary_size": 3, "logger_size": 5, "policy_size": 4}
SMALL_FLAGS = {f"weights__{name}": value for name, value in SMALL.items()}

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quarters(tmp_path)


def sequence(folder: Path) -> np.ndarray:
    with np.load(folder / sampled.SEQUENCE) as file:
        return file["sequence"]


@pytest.mark.slow
def test_a_run_keeps_what_it_drew_and_learned(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(source, compare="uniform,rl_sampler", steps=8, **SMALL_FLAGS)
    folder = source.parent / "run"
    uniform, row = results(folder)
    rows, own = len(load_data(config_of(source)).train), folder / "rl_sampler-seed0"
    drawn_rows = sequence(own)
    assert drawn_rows.shape == (8, 4)
    assert row["epochs"] == uniform["epochs"] == pytest.approx(8 * 4 / rows)
    metrics = read_metrics(own / "metrics.jsonl")
    assert [row["step"] for row in metrics if np.isfinite(row["reward"])] == [2, 4, 6, 8]
    assert [row["step"] for row in metrics if np.isfinite(row["policy_loss"])] == [4, 8]
    corrupted = load_data(config_of(source)).known("corrupted")
    assert metrics[0]["corrupted_share"] == pytest.approx(corrupted[drawn_rows[:2]].mean())
    counts = np.load(own / drawn.COUNTS)["counts"]
    np.testing.assert_array_equal(counts, np.bincount(drawn_rows.ravel(), minlength=rows))
    assert json.loads((own / drawn.FREQUENCIES).read_text())["draws"] == 32
    assert {"result.json", "sampler.safetensors", drawn.PLOT, drawn.PICTURE} <= {path.name for path in own.iterdir()}
    assert not (own / sampled.DRAWN).exists()
    report = (folder / "report.html").read_text()
    for title in ("rl_sampler: how often classes and rows were drawn", "rl_sampler: images drawn most and least often"):
        assert title in report
    assert row["corrupted_often"] is not None
    assert "wrong labels among the tenth drawn most" in (folder / "comparison.md").read_text()
    capsys.readouterr()
    call(source, "--eval-only", method="rl_sampler", steps=8, **SMALL_FLAGS)
    assert f"{row['test_accuracy']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("method", [pytest.param("rl_sampler", marks=pytest.mark.slow), "replayed"])
def test_a_continued_run_equals_an_uninterrupted_one(
    source: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; stopped within a window of the policy, whose hidden states, draws and rewards go on."""
    weights: dict[str, Any] = dict(SMALL)
    data = load_data(config_of(source))
    given = np.random.default_rng(0).integers(0, len(data.train), (STEPS, 4))
    if method == "replayed":
        weights["sequence_from"] = source.parent / "given.npz"
        own: dict[str, Any] = {"content_hash": data.train.content_hash, "num_rows": len(data.train)}
        save_sequence(weights["sequence_from"], given, **own)
    config = config_of(source, weights=weights, run_dir=source.parent / "whole")
    whole = final_state(config, method, monkeypatch)
    cut = dataclasses.replace(config, run_dir=source.parent / "cut")
    stop_after(2, cut, method, monkeypatch)
    for x, y in zip(whole, final_state(cut, method, monkeypatch), strict=True):
        np.testing.assert_array_equal(x, y)
    runs = [sequence(c.run_dir / f"{method}-seed0") for c in (config, cut)]
    np.testing.assert_array_equal(runs[0], runs[1])
    if method == "replayed":
        np.testing.assert_array_equal(runs[0], given)


@pytest.mark.slow
def test_a_killed_process_continues(source: Path) -> None:
    sizes = {name: value for name, value in SMALL_FLAGS.items() if "every" not in name}
    cut, whole = killed_and_whole(source, "rl_sampler", steps=1500, weights__policy_every=40, **sizes)
    assert metrics_of(cut) == metrics_of(whole)
    np.testing.assert_array_equal(sequence(cut), sequence(whole))
    with np.load(cut / sampled.SAMPLER) as one, np.load(whole / sampled.SAMPLER) as other:
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.slow
def test_sequences_are_replayed(source: Path) -> None:
    """By the same model, which then is the same at the end, and by another one."""
    call(source, method="rl_sampler", **SMALL_FLAGS)
    first, again = source.parent / "run", source.parent / "again"
    learned = first / "rl_sampler-seed0"
    call(source, method="replayed", run_dir=again, weights__sequence_from=learned)
    one, other = results(first)[0], results(again)[0]
    assert other["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    np.testing.assert_array_equal(sequence(again / "replayed-seed0"), sequence(learned))
    given = {"run_dir": source.parent / "c", "weights__sequence_from": learned / sampled.SEQUENCE, "seed": 3}
    call(source, method="replayed", steps=4, model__network="mlp-small", **given)
    np.testing.assert_array_equal(sequence(source.parent / "c" / "replayed-seed3"), sequence(learned)[:4])


@pytest.mark.slow
def test_samplers_are_transferred(source: Path) -> None:
    """To another network and seed, where the policy learns on; and to other labels of the same images, where it is kept."""
    call(source, method="rl_sampler", **SMALL_FLAGS)

    def policy(folder: Path) -> dict[str, np.ndarray]:
        with np.load(folder / sampled.SAMPLER) as file:
            return {key: file[key] for key in file.files if key.startswith(".")}

    learned = source.parent / "run" / "rl_sampler-seed0"
    other = {**SMALL_FLAGS, "model__network": "mlp-small", "seed": 3, "weights__sampler_from": learned}
    on, fixed = source.parent / "on", source.parent / "fixed"
    call(source, method="rl_sampler", run_dir=on, **other)
    kept = ("--weights.fixed-sampler", "--weights.other-data")
    call(source, *kept, method="rl_sampler", run_dir=fixed, data__noise_fraction=0.2, **other)
    begin, moved = policy(learned), policy(on / "rl_sampler-seed3")
    # One update by Adam in 6 steps moves a parameter by its learning rate, 0.04, at most.
    most = [np.abs(moved[key] - begin[key]).max() for key in begin]
    assert 0 < max(most) < 0.05
    for key, values in policy(fixed / "rl_sampler-seed3").items():
        np.testing.assert_array_equal(values, begin[key])


def test_mistakes_are_explained(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, learned = config_of(source, weights=SMALL), source.parent / "learned"
    data = load_data(config)
    rows, sampler = len(data.train), sampled.build_sampler(config, "rl_sampler", data)
    learned.mkdir()
    own: dict[str, Any] = {"content_hash": data.train.content_hash, "num_rows": rows}
    save_sequence(learned / sampled.SEQUENCE, np.zeros((STEPS, 4), int), **own)
    save_sampler(learned / sampled.SAMPLER, sampler.init(jax.random.key(0)).params, **own)
    replay = {"method": "replayed", "weights__sequence_from": learned}
    transfer = {"method": "rl_sampler", **SMALL_FLAGS, "weights__sampler_from": learned}
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"method": "replayed"}, (), "needs --weights.sequence-from"),
        ({**replay, "weights__sequence_from": learned.parent}, (), "sequence.safetensors does not exist"),
        (
            {**replay, "weights__sequence_from": learned / sampled.SAMPLER},
            (),
            "holds a learned sampler, not a sequence",
        ),
        ({**replay, "data__limit": 100}, (), f"belongs to data with {rows} rows, and the data at hand have"),
        ({**replay, "data__limit": 100}, ("--weights.other-data",), f"belongs to data with {rows} rows"),
        ({**replay, "data__noise_fraction": 0.1}, (), "belongs to data with the content hash"),
        ({**replay, "batch_size": 8}, (), "has 4 rows a step, but --batch-size is 8"),
        ({**replay, "steps": 10}, (), "The sequence has 6 steps, and 10 are asked for"),
        ({**transfer, "weights__sampler_from": source.parent / "no.npz"}, (), "no.npz does not exist"),
        ({**transfer, "data__limit": 100}, (), f"belongs to data with {rows} rows"),
        ({**transfer, "data__noise_fraction": 0.1}, (), "belongs to data with the content hash"),
        ({**transfer, "weights__policy_size": 8}, (), "does not fit: its"),
        (
            {"compare": "uniform,rl_sampler"},
            ("--resident", "never"),
            "--resident never does not fit rl_sampler, whose data",
        ),
        ({"method": "rl_sampler"}, ("--weights.fixed-sampler",), "say where by --weights.sampler-from"),
        (
            {"method": "rl_sampler", "weights__reward_parts": 5},
            (),
            "--weights.reward-parts 5 does not divide the 24 dev",
        ),
        (
            {"method": "rl_sampler", "weights__policy_every": 30},
            (),
            "--weights.reward-every 20 must divide --weights.policy-every 30",
        ),
    ]
    for i, (given, more, message) in enumerate(cases):
        with pytest.raises(SystemExit) as stopped:
            call(source, *more, run_dir=source.parent / str(i), **given)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1


def test_all_methods_replay_only_what_is_given() -> None:
    assert "rl_sampler" in Config(compare="all").methods()
    assert "replayed" not in Config(compare="all").methods()
    given = dataclasses.replace(Config().weights, sequence_from=Path("x"))
    assert "replayed" in Config(compare="all", weights=given).methods()


def test_frequencies(source: Path) -> None:
    """20 rows: 0 and 1 are never drawn, 18 and 19 most often; 0 and 19 have wrong labels."""
    config = config_of(source)
    wrong = np.isin(np.arange(20), [0, 19])
    sets = load_data(config).sets.transform(
        lambda arrays: {**{name: array[:20] for name, array in arrays.items()}, "corrupted": wrong}, "train"
    )
    data = prepared(config.data, sets)
    counts = np.asarray([0, 0, *[5] * 16, 12, 8])
    sequence = np.random.default_rng(0).permutation(np.repeat(np.arange(20), counts)).reshape(-1, 4)
    summary = drawn.save_frequencies(source.parent, sequence, data)
    found = json.loads((source.parent / drawn.FREQUENCIES).read_text())
    assert found["draws"] == 100
    assert found["rows"]["never_drawn"] == pytest.approx(0.1)
    assert (found["rows"]["least"], found["rows"]["most"]) == (0, 12)
    assert found["rows"]["most_deviation"] == pytest.approx(12 / 5 - 1)
    assert summary == {"corrupted_often": 0.5, "corrupted_rarely": 0.5, "spread": pytest.approx(counts.var() / 5)}
    assert found["corrupted"]["all"] == pytest.approx(0.1)
    assert found["corrupted"]["drawn"] == pytest.approx(0.08)
    true = data.known("clean_label").astype(int)
    assert list(found["classes"]["counts"].values()) == np.bincount(true, counts, minlength=4).tolist()
    # The most drawn image is the first of the picture, under its label.
    assert "drawn most often" in (source.parent / drawn.PICTURE).read_text()
    assert "<svg" in (source.parent / drawn.PLOT).read_text()


def test_chance_is_no_preference(source: Path) -> None:
    """Uniform draws with replacement spread as much as the counts beside them; whole epochs do not spread."""
    data = load_data(config_of(source))
    rows = len(data.train)
    by_chance = drawn.save_frequencies(source.parent, np.random.default_rng(1).integers(0, rows, (1000, 40)), data)
    assert by_chance["spread"] == pytest.approx(1, abs=0.5)
    found = json.loads((source.parent / drawn.FREQUENCIES).read_text())
    assert found["rows_by_chance"]["spread"] == pytest.approx(1, abs=0.5)
    epochs = drawn.save_frequencies(source.parent, np.arange(4 * rows).reshape(-1, 4) % rows, data)
    assert epochs["spread"] == 0
    assert epochs["corrupted_often"] == epochs["corrupted_rarely"] == data.known("corrupted").mean()
