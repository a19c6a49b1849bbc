"""Translation: its data, networks and evaluation, what its models write, and each method for a few steps, as a user calls it."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import compare, equal_after_a_kill, metrics_of, refused, results
from tiny_pairs import ANIMALS, DOMAINS, LENGTH, PIECES, pair_flags, write_pairs
from traced import fitting, setting_of, trace

from bilevel import cli
from bilevel.data import PackedPairs
from bilevel.study import ModelOptions
from bilevel.tasks import translation
from bilevel.tasks.translation import TASK, DataConfig, ModelConfig, PairSplits, TranslationConfig
from bilevel.training.optimizers import OptimizerConfig, optimizer_of

pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_pairs(tmp_path)


def config_of(text: Path, model: ModelConfig | None = None, **data: Any) -> TranslationConfig:
    given = {"generic": str(text / "generic.tsv"), "specific": str(text / "specific"), "target_language": "cs", **data}
    small = DataConfig(cache_dir=text / "cache", length=LENGTH, vocabulary=PIECES, **given)
    return TranslationConfig(small, model or ModelConfig(weighting_width=4, weighting_hidden=8))


def splits_of(text: Path, **data: Any) -> PairSplits:
    return TASK.open(config_of(text, **data), text)


# -- as a user calls it ----------------------------------------------------------------------------------------------


def test_a_comparison_writes_judges_and_tests(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = pair_flags(text, data__generic_labels=text / "labels.tsv", finetune__steps=4, compare="uniform,soba")
    before = compare("translation", text / "run", **given, no_judge=True)
    assert not [name for row in before for name in row if "bleu" in name]
    rows = compare("translation", text / "run", **given)  # judges what was not judged
    assert [{name: row[name] for name in old} for old, row in zip(before, rows, strict=True)] == before
    assert compare("translation", text / "run", **given) == rows, "and judges once"
    evaluated = json.loads((text / "run" / "uniform-seed0" / "result.json").read_text())
    uniform, soba = rows
    assert evaluated["test_bleu"] == uniform["test_bleu"]
    measures = ("loss", "nll", "bleu", "chrf")
    names = [
        f"{phase}_{name}{end}" for phase in ("test", "finetuned_test") for name in measures for end in ("", "/test_b")
    ]
    for row in rows:
        for name in (*names, "valid_loss", "valid_loss/generic", "share/fault"):
            assert math.isfinite(row[name]), name
    assert "p_bleu" not in uniform
    for name in ("p_bleu", "p_chrf", "finetuned_p_bleu", "finetuned_p_chrf"):
        assert 0 < soba[name] <= 1, name
    out = capsys.readouterr().out
    for title in ("| test BLEU |", "| test chrF, fine-tuned |", "| p, BLEU, fine-tuned |", "Loss in nats per piece"):
        assert title in out, title
    last = metrics_of(text / "run" / "soba-seed0")[-1]
    assert sum(last[f"share/{name}"] for name in DOMAINS) == pytest.approx(1)
    for name in ("outputs.json", "finetuned_outputs.json"):
        written = json.loads((text / "run" / "soba-seed0" / name).read_text())["texts"]
        assert {which: len(texts) for which, texts in written.items()} == {"test_a": 20, "test_b": 12}
    report = (text / "run" / "report.html").read_text()
    for part in ("⇒", "Against uniform", "BLEU: nrefs:1|", "tok:13a"):
        assert part in report, part


@pytest.mark.slow
@pytest.mark.parametrize("network", ["xs", "lstm"])
def test_a_killed_run_ends_like_one_left_alone(network: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pair_flags(text, compare="soba", model__network=network, model__hidden=8, model__embedding=8)
    killed, whole = equal_after_a_kill("translation", text, monkeypatch, **given)
    assert metrics_of(killed / "soba-seed0") == metrics_of(whole / "soba-seed0")
    assert results(killed)[0]["test_bleu"] == results(whole)[0]["test_bleu"]
    kept = [(folder / "soba-seed0" / "outputs.json").read_text() for folder in (killed, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("network", ["xs", "lstm"])
def test_methods_of_each_kind_can_be_trained_on_pairs(network: str, text: Path) -> None:
    data = {"generic": str(text / "generic.tsv"), "generic_labels": str(text / "labels.tsv"), "known_faults": True}
    sizes = {"specific": str(text / "specific"), "target_language": "cs", "length": LENGTH, "vocabulary": PIECES}
    model = {"network": network, "hidden": 8, "embedding": 8, "weighting_width": 4}
    # All methods run on the linear task.
    given = {"data": {**data, **sizes, "cache_dir": str(text / "cache")}, "model": model}
    setting = setting_of(TASK, text / "run", given, {"contrastive": {"fraction": 0.1, "rows": 100}})
    methods = fitting(setting)
    assert {"soba", "dds", "mentornet", "rho_loss", "classifier", "contrastive", "mixing"} <= {*methods}
    for method in ("uniform", "mentornet", "rho_loss", "soba", "dds") if network == "xs" else ("soba", "dds"):
        trace(setting, method)


@pytest.mark.slow
def test_the_learned_weights_avoid_copies(text: Path) -> None:
    given = pair_flags(text, data__generic_labels=text / "labels.tsv", compare="uniform,soba", steps=400, log_every=20)
    more = {"batch_size": 8, "big_batch_size": 64, "optimizer__learning_rate": 0.01, "evaluate_every": 200}
    uniform, soba = compare("translation", text / "run", **given, **more, no_judge=True)
    assert soba["test_loss"] < uniform["test_loss"]
    tail = metrics_of(text / "run" / "soba-seed0")[-5:]
    assert np.mean([row["share/animals"] for row in tail]) > 0.7, "half of the pairs are about animals"


def test_the_papers_experiment(text: Path) -> None:
    """Grangier et al., tables 4 and 14."""
    found = cli.parse(["compare", "translation", "--preset", "atd"]).settings
    study, model = found.study, found.task.model
    assert (study.batch_size, study.big_batch_size, study.steps) == (256, 2048, 500_000)
    assert (study.optimizer.learning_rate, study.optimizer.b2, study.optimizer.warmup) == (2e-4, 0.98, 1000)
    assert (model.network, model.dropout, model.smoothing, model.beam, model.length_penalty) == (
        "big",
        0.1,
        0.1,
        4,
        0.6,
    )
    assert (model.weighting_width, model.weighting_hidden, found.task.data.vocabulary) == (32, 128, 32_000)
    assert found.methods["soba"].chosen_rate == 0.001


# -- data ------------------------------------------------------------------------------------------------------------


def test_splits_and_what_is_known(text: Path) -> None:
    splits = splits_of(text, generic_labels=text / "labels.tsv")
    train = splits.train
    assert isinstance(train, PackedPairs)
    assert [*splits.valid] == ["specific", "generic"], "the specific set decides"
    assert [*splits.test] == ["test_a", "test_b"]
    assert len(train) + len(splits.valid["generic"]) == 300
    assert [*splits.known] == ["domain", "fault"], "one kind of fault is not listed for itself"
    fault, domain = splits.known["fault"], splits.known["domain"]
    for i in range(len(train)):
        source, target = train.text(i)
        assert fault.values[i] == (source == target)
        assert domain.names[domain.values[i]] == ("animals" if source.split()[0] in ANIMALS else "tools")
    wrong, right = (int(np.flatnonzero(fault.values == value)[0]) for value in (1, 0))
    shown = TASK.show(config_of(text), splits, np.asarray([wrong, right]))
    assert [row.label for row in shown] == ["animals, copied", domain.names[domain.values[right]]]
    assert shown[1].text == " ⇒ ".join(train.text(right))
    assert splits.taught is None
    assert splits_of(text, generic_labels=text / "labels.tsv", known_faults=True).taught is not None
    assert splits_of(text).known == {}


def test_several_kinds_of_faults(text: Path) -> None:
    lines = (text / "labels.tsv").read_text().splitlines()
    kinds = [
        line.replace("none", "rotated") if line.startswith("tools") and i % 2 else line for i, line in enumerate(lines)
    ]
    (text / "labels.tsv").write_text("\n".join(kinds) + "\n")
    known = splits_of(text, generic_labels=text / "labels.tsv").known
    assert {*known} == {"domain", "fault", "copied", "rotated"}
    total = known["copied"].values + known["rotated"].values
    np.testing.assert_array_equal(known["fault"].values, total)
    assert known["rotated"].names == ("other", "rotated")


# -- model and measures ----------------------------------------------------------------------------------------------


def test_the_measures_are_totals_over_all_pieces(text: Path) -> None:
    config, splits = config_of(text), splits_of(text)
    model = TASK.model(config, splits, ModelOptions())
    params, state = model.init(jax.random.key(0))
    rows = splits.test["test_a"]
    found = TASK.evaluate(config, splits, model)(params, state, rows, None)
    batch = rows.rows(np.arange(len(rows)))
    shape = translation._network(config, splits, ModelOptions())
    logits = shape.network.logits(params, batch, None)
    chances = np.asarray(jax.nn.log_softmax(logits), np.float64)
    size, totals, count = chances.shape[-1], np.zeros(2), 0
    for row, target, length in zip(chances, batch["target"], batch["target_length"], strict=True):
        for piece, one in zip(target[:length], row[:length], strict=True):
            q = np.full(size, 0.1 / (size - 1))
            q[piece] = 0.9
            totals += -(q * one).sum(), -one[piece]
            count += 1
    np.testing.assert_allclose([found["loss"], found["nll"]], totals / count, rtol=1e-5)


def test_pieces_or_pairs_count_alike(text: Path) -> None:
    splits = splits_of(text)
    batch = {name: jnp.asarray(x) for name, x in splits.train.rows(np.arange(200)).items()}
    losses = []
    for weigh in (False, True):
        model = TASK.model(config_of(text, ModelConfig(weigh_pieces=weigh, dropout=0.0)), splits, ModelOptions())
        params, state = model.init(jax.random.key(0))
        losses.append(np.asarray(model.loss(params, state, batch, jax.random.key(1))[0]))
        evaluated = np.asarray(model.evaluation(params, state, batch, jax.random.key(1))[0])
        np.testing.assert_allclose(evaluated, losses[0], rtol=1e-6)
    length = np.asarray(batch["target_length"], np.float64)
    mean = np.diff(splits.train.starts)[1::2].mean()  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(losses[1], losses[0] * length / mean, rtol=1e-5)


def test_a_schedule_that_falls_with_the_inverse_root() -> None:
    """Vaswani et al., equation 3: linear to the peak in the warm-up, then peak · √(warm-up/step)."""
    optimizer = optimizer_of(OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0, schedule="rsqrt", warmup=4), 100)
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(16):
        move, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        moves.append(-float(jnp.asarray(move)))
    np.testing.assert_allclose(moves, [min(t / 4, math.sqrt(4 / t)) for t in range(1, 17)], rtol=1e-6)


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"data__generic": "nowhere.tsv"}, "nowhere.tsv does not exist"),
    "languages that are not there": ({"data__target_language": "de"}, "de"),
    "labels of other pairs": ({"data__generic_labels": "EMPTY"}, "empty.tsv"),
    "faults without labels": ({"data__known_faults": True}, "--data.known-faults needs"),
    "rows too short": ({"data__length": 2}, "--data.length"),
    "too many pieces": ({"data__vocabulary": 5000}, "--data.vocabulary"),
    "no such tokenizer": ({"data__tokenizer": "no.model"}, "--data.tokenizer"),
    "a ratio below 1": ({"data__max_ratio": 0.5}, "--data.max-ratio 0.5 must be at least 1"),
    "no hypotheses": ({"model__beam": 0}, "--model.beam 0 must be at least 1"),
    "all mass smoothed away": ({"model__smoothing": 1.0}, "--model.smoothing 1.0 must be less than 1"),
    "more blocks than there are": (
        {"soba__probe_blocks": 9},
        "--soba.probe-blocks 9: the last 9 blocks of a decoder that has 1",
    ),
    "mentornet without faults": ({"compare": "mentornet"}, "known to be right or wrong"),
    "a method for labels": ({"compare": "svp"}, "--compare names svp, which needs rows with a label"),
    "one source language": (
        {"compare": "tcs"},
        "--compare names tcs, which needs pairs of several source languages",
    ),
    "unknown held-out network": (
        {"compare": "rho_loss", "rho_loss__held_out_network": "huge"},
        'There is no translation model "huge": choose from xs',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_INPUT[case]
    (text / "empty.tsv").touch()
    paths = {"EMPTY": text / "empty.tsv"}
    chosen = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    assert message in refused("translation", text / "run", capsys, **pair_flags(text, **{"compare": "soba", **chosen}))
