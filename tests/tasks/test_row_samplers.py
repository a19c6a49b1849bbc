"""RLSampler on images: trained, killed, replayed and transferred; what it drew, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import compare, equal_after_a_kill, metrics_of, refused
from tiny_images import image_flags, quarters, rows_of

from bilevel import samplers
from bilevel.data import rows_hash
from bilevel.files import load_tree
from bilevel.training import load_sequence, save_sampler, save_sequence

SMALL = {"policy_every": 4, "reward_every": 2, "summary_size": 3, "logger_size": 5, "policy_size": 4}
SMALL_FLAGS = {f"rl_sampler__{name}": value for name, value in SMALL.items()}
SEQUENCE, SAMPLER = "sequence.safetensors", "sampler.safetensors"
NAME = "image_classification"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return quarters(tmp_path)


def sequence(folder: Path, rows: int) -> np.ndarray:
    return load_sequence(folder / SEQUENCE, content_hash=None, num_rows=rows)


@pytest.mark.slow
def test_a_run_keeps_what_it_drew_and_learned(source: Path) -> None:
    folder = source.parent / "run"
    given = image_flags(source, compare="uniform,rl_sampler", steps=8, targets=0.5, **SMALL_FLAGS)
    uniform, row = compare(NAME, folder, **given)
    splits, own = rows_of(source), folder / "rl_sampler-seed0"
    rows = len(splits.train)
    found = sequence(own, rows)
    assert found.shape == (8, 4)
    assert row["epochs"] == uniform["epochs"] == pytest.approx(8 * 4 / rows)
    metrics = metrics_of(own)
    for name, steps in (("reward", [2, 4, 6, 8]), ("policy_loss", [4, 8])):
        known = [row["step"] for row in metrics if row[name] is not None and np.isfinite(row[name])]
        assert known == steps, name
    wrong = splits.known["wrong_label"].values == 1
    assert metrics[0]["share/wrong_label"] == pytest.approx(wrong[found[:2]].mean())
    counts, _ = load_tree(own / "counts.safetensors")
    np.testing.assert_array_equal(counts["counts"], np.bincount(found.ravel(), minlength=rows))
    assert json.loads((own / "frequencies.json").read_text())["draws"] == 32
    assert {"result.json", SAMPLER, "frequencies.svg"} <= {path.name for path in own.iterdir()}
    assert not (own / "sequence.part").exists()
    assert "rl_sampler: how often classes and rows were drawn" in (folder / "report.html").read_text()
    assert row["wrong_label_often"] is not None


@pytest.mark.slow
def test_a_killed_run_ends_like_one_left_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a window of the policy, whose hidden states, draws and rewards go on."""
    given = image_flags(source, compare="rl_sampler", **{**SMALL_FLAGS, "rl_sampler__policy_every": 10})
    folders = equal_after_a_kill(NAME, source.parent, monkeypatch, **given)
    killed, whole = (folder / "rl_sampler-seed0" for folder in folders)
    assert metrics_of(killed) == metrics_of(whole)
    for name in (SEQUENCE, SAMPLER):
        (one, about), (other, also) = load_tree(killed / name), load_tree(whole / name)
        assert about == also
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_given_sequence_is_replayed(source: Path) -> None:
    train = rows_of(source).train
    given = np.random.default_rng(0).integers(0, len(train), (6, 4))
    save_sequence(source.parent / "given.safetensors", given, content_hash=rows_hash(train), num_rows=len(train))
    replay = image_flags(source, compare="replayed", replayed__sequence=source.parent / "given.safetensors")
    compare(NAME, source.parent / "run", **replay)
    np.testing.assert_array_equal(sequence(source.parent / "run" / "replayed-seed0", len(train)), given)


@pytest.mark.slow
def test_what_a_run_drew_trains_the_same_model(source: Path) -> None:
    """Replayed by the same model, which then is the same at the end, and by another one for fewer steps."""
    learned, rows = source.parent / "run" / "rl_sampler-seed0", len(rows_of(source).train)
    (one,) = compare(NAME, source.parent / "run", **image_flags(source, compare="rl_sampler", **SMALL_FLAGS))
    replay = image_flags(source, compare="replayed", replayed__sequence=learned)
    (other,) = compare(NAME, source.parent / "again", **replay)
    assert other["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    compare(NAME, source.parent / "c", **replay, steps=4, seed=3, model__network="mlp-small")
    np.testing.assert_array_equal(sequence(source.parent / "c" / "replayed-seed3", rows), sequence(learned, rows)[:4])


@pytest.mark.slow
def test_a_policy_is_transferred(source: Path) -> None:
    """To another network and seed, where it learns on; and to other labels of the same images, where it is kept."""
    compare(NAME, source.parent / "run", **image_flags(source, compare="rl_sampler", **SMALL_FLAGS))

    def policy(folder: Path) -> list[np.ndarray]:
        return jax.tree.leaves(load_tree(folder / SAMPLER)[0])

    learned = source.parent / "run" / "rl_sampler-seed0"
    other = image_flags(source, compare="rl_sampler", model__network="mlp-small", seed=3, **SMALL_FLAGS)
    other["rl_sampler__start_from"] = learned
    on, fixed = source.parent / "on", source.parent / "fixed"
    compare(NAME, on, **other)
    kept = {"rl_sampler__fixed": True, "rl_sampler__other_data": True, "data__noise_fraction": 0.2}
    compare(NAME, fixed, **other, **kept)
    begin, moved = policy(learned), policy(on / "rl_sampler-seed3")
    # One update by Adam in 6 steps moves a parameter by its learning rate, 0.04, at most.
    assert 0 < max(np.abs(a - b).max() for a, b in zip(moved, begin, strict=True)) < 0.05
    for a, b in zip(policy(fixed / "rl_sampler-seed3"), begin, strict=True):
        np.testing.assert_array_equal(a, b)


REPLAY = {"compare": "replayed", "replayed__sequence": "LEARNED"}
TRANSFER = {"compare": "rl_sampler", **SMALL_FLAGS, "rl_sampler__start_from": "LEARNED"}
BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to replay": ({"compare": "replayed"}, "needs --replayed.sequence"),
    "no sequence there": ({**REPLAY, "replayed__sequence": "PARENT"}, "sequence.safetensors does not exist"),
    "a sampler": ({**REPLAY, "replayed__sequence": "SAMPLER"}, "holds a learned sampler, not a sequence"),
    "fewer rows": ({**REPLAY, "data__limit": 100}, "and the data at hand have"),
    "fewer rows of other data": ({**REPLAY, "data__limit": 100, "replayed__other_data": True}, "belongs to data with"),
    "other labels": ({**REPLAY, "data__noise_fraction": 0.1}, "belongs to data with the content hash"),
    "another batch size": ({**REPLAY, "batch_size": 8}, "has 4 rows a step, but --batch-size is 8"),
    "more steps": ({**REPLAY, "steps": 10}, "The sequence has 6 steps, and 10 are asked for"),
    "no policy there": ({**TRANSFER, "rl_sampler__start_from": "no.safetensors"}, "no.safetensors does not exist"),
    "a policy of fewer rows": ({**TRANSFER, "data__limit": 100}, "belongs to data with"),
    "a policy of other labels": ({**TRANSFER, "data__noise_fraction": 0.1}, "belongs to data with the content hash"),
    "a policy of another size": ({**TRANSFER, "rl_sampler__policy_size": 8}, "does not fit"),
    "data that travel": ({"compare": "rl_sampler", "resident": "never"}, "--resident never does not fit rl_sampler"),
    "a fixed policy of nowhere": ({"compare": "rl_sampler", "rl_sampler__fixed": True}, "by --rl-sampler.start-from"),
    "parts of a reward": (
        {"compare": "rl_sampler", "rl_sampler__reward_parts": 5},
        "--rl-sampler.reward-parts 5 does not divide the 24 specific rows",
    ),
    "rewards between policies": (
        {"compare": "rl_sampler", "rl_sampler__policy_every": 30},
        "--rl-sampler.reward-every 20 must divide --rl-sampler.policy-every 30",
    ),
}


@pytest.fixture
def learned(source: Path) -> Path:
    """The directory of a run that drew rows and learned a policy."""
    splits, folder = rows_of(source), source.parent / "runs" / "learned"
    folder.mkdir(parents=True)
    own: dict[str, Any] = {"content_hash": rows_hash(splits.train), "num_rows": len(splits.train)}
    sampler = samplers.rl_sampler(
        len(splits.train), 4, 4, update_every=4, reward_every=2, summary_size=3, logger_size=5, policy_size=4
    )
    save_sequence(folder / SEQUENCE, np.zeros((6, 4), int), **own)
    save_sampler(folder / SAMPLER, sampler.init(jax.random.key(0)).params, **own)
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(
    case: str, source: Path, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, message = BAD_INPUT[case]
    paths = {"LEARNED": learned, "PARENT": learned.parent, "SAMPLER": learned / SAMPLER}
    chosen = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    assert message in refused(NAME, source.parent / "run", capsys, **image_flags(source, **chosen))
