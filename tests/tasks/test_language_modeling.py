"""Language modelling: its data, networks and evaluation, and each method for a few steps, as a user calls it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from commands import compare, equal_after_a_kill, flags, metrics_of, refused, results
from tiny_text import DOMAINS, TINY, text_flags, write_texts
from traced import fitting, setting_of, trace

from bilevel import cli
from bilevel.data import PackedText, RowView
from bilevel.devices import sharding
from bilevel.nn.transformer import SIZES, Transformer, TransformerConfig, last_blocks
from bilevel.study import ModelOptions, Text
from bilevel.study.run import Run
from bilevel.tasks.language_modeling import TASK, DataConfig, LanguageConfig, ModelConfig, TextSplits
from bilevel.types import UserError

LENGTH = 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def config_of(text: Path, model: ModelConfig | None = None, **data: Any) -> LanguageConfig:
    given = {"generic": str(text / "generic.txt"), "specific": str(text / "specific"), "length": LENGTH, **data}
    return LanguageConfig(DataConfig(cache_dir=text / "cache", **given), model or ModelConfig(weighting_width=8))


def splits_of(text: Path, **data: Any) -> TextSplits:
    return TASK.open(config_of(text, **data), text)


def packed(rows: Any) -> PackedText:
    found = rows.dataset if isinstance(rows, RowView) else rows
    assert isinstance(found, PackedText)
    return found


# -- as a user calls it ----------------------------------------------------------------------------------------------


def test_a_comparison_of_several_methods(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = text_flags(text, data__generic_labels=text / "labels.tsv")
    rows = compare("language_modeling", text / "run", **given, compare="uniform,soba")
    assert [row["method"] for row in rows] == ["uniform", "soba"]
    for row in rows:
        for name in ("seconds", "valid_loss", "test_loss", "valid_loss/generic"):
            assert math.isfinite(row[name]), name
    table = (text / "run" / "comparison.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "Loss in nats per byte" in table
    last = metrics_of(text / "run" / "soba-seed0")[-1]
    assert sum(last[f"share/{name}"] for name in DOMAINS) == pytest.approx(1)
    report = (text / "run" / "report.html").read_text()
    assert "data:image" in report
    assert "https://" not in report
    assert "<script>UPPER" not in report
    assert "&lt;script&gt;UPPER" in report


@pytest.mark.slow
def test_a_killed_run_ends_like_one_left_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, whole = equal_after_a_kill("language_modeling", text, monkeypatch, **text_flags(text, compare="soba"))
    assert metrics_of(killed / "soba-seed0") == metrics_of(whole / "soba-seed0")
    assert results(killed)[0]["test_loss"] == results(whole)[0]["test_loss"]


def test_every_method_can_be_trained_on_text(text: Path) -> None:
    """Its step on batches of text is traced; on the linear task all of them run."""
    data = {
        "generic": str(text / "generic.txt"),
        "generic_labels": str(text / "labels.tsv"),
        "cache_dir": str(text / "cache"),
    }
    given = {"data": {**data, "specific": str(text / "specific"), "length": LENGTH}, "model": {"weighting_width": 8}}
    setting = setting_of(TASK, text / "run", given, {"contrastive": {"fraction": 0.1, "rows": 100}})
    for method in fitting(setting):
        trace(setting, method)


@pytest.mark.slow
def test_a_frozen_network_of_another_run(text: Path) -> None:
    given = text_flags(text)
    compare("language_modeling", text / "run", **given, compare="soba")
    learned = text / "run" / "soba-seed0"
    compare("language_modeling", text / "run", **given, compare="frozen", frozen__weights=learned)
    kept = [(folder / "weights.safetensors").read_bytes() for folder in (learned, text / "run" / "frozen-seed0")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_state_split_over_devices_trains_the_same(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array of two scanned blocks is split, however small."""
    monkeypatch.setitem(SIZES, "xs", dataclasses.replace(TINY, layers=2))
    split, original = [], sharding.split_state
    monkeypatch.setattr(
        sharding, "split_state", lambda mesh, state: split.append(mesh.size) or original(mesh, state, min_size=1)
    )
    given = text_flags(text, compare="soba", model__scan_layers=True)
    (alone,) = compare("language_modeling", text / "run", **given)
    mesh = sharding.make_mesh(jax.devices()[:1])
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), mesh.axis_names, axis_types=mesh.axis_types)
    monkeypatch.setattr(sharding, "make_mesh", lambda *devices: mesh)
    (split_over,) = compare("language_modeling", text / "split", **given, shard_state=True)
    assert split == [4]
    for name in ("test_loss", "valid_loss/generic"):
        assert split_over[name] == pytest.approx(alone[name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.data
def test_soba_finds_the_domain_in_real_text(tmp_path: Path) -> None:
    folder = os.environ.get("BILEVEL_DATA")
    if not folder or not (Path(folder) / "lm" / "generic" / "train.txt.gz").exists():
        pytest.skip("BILEVEL_DATA does not name a folder with lm/generic and lm/specific")
    lm = Path(folder) / "lm"
    command = flags(
        tmp_path / "run", compare="uniform,soba", steps=400, batch_size=16, big_batch_size=512,
        log_every=50, evaluate_every=200, checkpoint_every=400, data__generic=lm / "generic" / "train.txt.gz",
        data__generic_labels=lm / "generic" / "train.labels.tsv.gz", data__specific=lm / "specific" / "rct_abstracts",
        data__cache_dir=tmp_path / "cache",
    )  # fmt: skip
    # A process of its own: with the network as users have it, and programs that are fast instead of quickly compiled.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    called = [sys.executable, "-m", "bilevel.cli", "compare", "language_modeling", *command]
    subprocess.run(called, env=environment, check=True, capture_output=True)
    uniform, soba = results(tmp_path / "run")
    assert soba["test_loss"] < uniform["test_loss"] < 2.9
    last = metrics_of(tmp_path / "run" / "soba-seed0")[-1]
    assert last["share/biomedical_articles"] > 3 * 0.0085, "its share in the generic data"


def test_the_papers_experiment(text: Path) -> None:
    """Grangier et al., tables 1 and 13; with sizes made small it runs."""
    found = cli.parse(["compare", "language_modeling", "--preset", "atd"]).settings
    study, model, soba = found.study, found.task.model, found.methods["soba"]
    assert (study.batch_size, study.big_batch_size, study.steps) == (128, 16_384, 300_000)
    assert (study.optimizer.name, study.optimizer.learning_rate) == ("adam", 0.002)
    assert (model.network, model.dropout, found.task.data.length) == ("large", 0.1, 256)
    assert (model.weighting, model.weighting_layers, model.weighting_width) == ("conv", 2, 128)
    paper = cli.parse(["compare", "language_modeling", "--preset", "paper"]).settings
    assert soba.chosen_rate == 0.001
    assert found.methods == paper.methods != cli.parse(["compare", "language_modeling"]).settings.methods
    assert paper.study.batch_size != 128, "the preset of the methods alone sets no sizes"
    given = text_flags(text, preset="atd", compare="soba", batch_size=8, big_batch_size=32, steps=2)
    (row,) = compare("language_modeling", text / "run", **given)
    assert math.isfinite(row["test_loss"])
    recorded = yaml.safe_load((text / "run" / "soba-seed0" / "config.yaml").read_text())
    assert (recorded["model"]["dropout"], recorded["soba"]["derivatives"]) == (0.1, "forward")


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"data__generic": "nowhere.txt"}, "--data.generic: The file nowhere.txt does not exist"),
    "missing folder": ({"data__specific": "nowhere"}, "--data.specific: The file nowhere does not exist"),
    "missing labels": (
        {"data__generic_labels": "no.tsv"},
        "leave the labels out (--data.generic-labels).",
    ),
    "missing faults": (
        {"data__generic_faults": "no.tsv"},
        "--data.generic-faults: The fault file no.tsv does not exist",
    ),
    "empty file": ({"data__generic": "EMPTY"}, "empty.txt is empty"),
    "not UTF-8": ({"data__generic": "LATIN"}, "latin.txt, line 2"),
    "labels of other documents": ({"data__generic_labels": "EMPTY"}, "empty.txt"),
    "unknown data set": ({"data__generic": "tfds:no_such_set"}, "no_such_set"),
    "no bytes": ({"data__length": 0}, "--data.length 0 must be at least 1"),
    "all units dropped": ({"model__dropout": 1.0}, "--model.dropout 1.0 must be less than 1"),
    "one document": ({"data__documents": "file"}, "has 1 documents, too few different ones to hold some out"),
    "a field of plain text": ({"data__field": "body"}, "is plain text"),
    "small specific set": ({"soba__specific_batch_size": 5000}, "A specific batch of 5000 rows"),
    "b > B": ({"big_batch_size": 2}, "--big-batch-size 2 is smaller than --batch-size 4"),
    "one row alone": ({"batch_size": 1}, "batch_size=1 leaves one row to learn the weights from"),
    "unknown method": ({"compare": "uniform,magic"}, '--compare names the method "magic", which does not exist'),
    "a method for labels": ({"compare": "uniform,svp"}, "--compare names svp, which needs rows with a label"),
    "mentornet without faults": (
        {"compare": "mentornet"},
        "known to be right or wrong (documents: --data.generic-faults)",
    ),
    "faults of other documents": ({"data__generic_faults": "EMPTY"}, "The fault file"),
    "clean rows beside faults": (
        {"data__generic_faults": "FAULTS", "compare": "mentornet", "mentornet__specific_batch_size": 4},
        "--mentornet.specific-batch-size 4 is of no use",
    ),
    "unwritable directory": ({"run_dir": "BELOW"}, "Cannot write to the run directory"),
    "more blocks than there are": (
        {"soba__probe_blocks": 9},
        "--soba.probe-blocks 9: the last 9 blocks of a model that has 1",
    ),
    "blocks of one program": (
        {"soba__probe_blocks": 1, "model__scan_layers": True},
        "--soba.probe-blocks 1: this network has no blocks; give 0",
    ),
    "all rows specific": ({"compare": "mixing", "mixing__fraction": 1.0}, "--mixing.fraction 1.0 of --batch-size 4"),
    "all candidates specific": (
        {"soba__specific_candidates": 16},
        "--soba.specific-candidates 16 of --big-batch-size 16",
    ),
    "no rows before selection": (
        {"compare": "contrastive", "contrastive__start": 0.01},
        "--contrastive.start 0.01 leaves 0 of 6 steps",
    ),
    "too few rows after selection": (
        {"compare": "contrastive", "contrastive__rows": 10},
        "--contrastive.fraction 0.03 of 10 scored rows keeps fewer than the --batch-size 4",
    ),
    "more than all rows after selection": (
        {"compare": "contrastive", "contrastive__fraction": 1.5},
        "--contrastive.fraction 1.5 must lie in (0, 1]",
    ),
    "no scores": (
        {"compare": "contrastive", "contrastive__scores": "nowhere.safetensors"},
        "There are no scores at nowhere.safetensors: give --contrastive.scores",
    ),
    "frozen without weights": ({"compare": "frozen"}, "--frozen.weights"),
    "frozen with damaged weights": ({"compare": "frozen", "frozen__weights": "BROKEN"}, "weights.safetensors"),
    "a network of no width": ({"model__weighting_width": 0}, "--model.weighting-width 0 must be at least 1"),
    "a network of no layers": ({"model__weighting_layers": 0}, "--model.weighting-layers 0 must be at least 1"),
    "unknown held-out network": (
        {"compare": "rho_loss", "rho_loss__held_out_network": "huge"},
        'There is no language model "huge": choose from xs',
    ),
    "nothing to evaluate": ({"eval_only": True}, "holds no checkpoint"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, message = BAD_INPUT[case]
    (text / "empty.txt").touch()
    (text / "latin.txt").write_bytes(b"good line\nbad \xe9\xe8 line\n")
    (text / "broken").mkdir()
    (text / "broken" / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00 cut off")
    (text / "faults.tsv").write_text("right\nwrong\n" * 150)
    paths = {
        "EMPTY": text / "empty.txt", "LATIN": text / "latin.txt", "BROKEN": text / "broken",
        "BELOW": text / "generic.txt" / "run", "FAULTS": text / "faults.tsv",
    }  # fmt: skip
    chosen = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    run_dir = Path(chosen.pop("run_dir", text / "run"))
    assert message in refused("language_modeling", run_dir, capsys, **text_flags(text, **{"compare": "soba", **chosen}))


def test_other_text_in_the_same_file_is_other_data(text: Path) -> None:
    before, file = splits_of(text).hashes, text / "specific" / "test.txt"
    file.write_text(file.read_text() + "one more line\n")
    after = splits_of(text).hashes
    assert [name for name in before if before[name] != after[name]] == ["test_specific"]


# -- data ------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_documents(text: Path) -> None:
    splits = splits_of(text)
    document = np.asarray(packed(splits.train).document)
    kept, held = (document[rows.rows(np.arange(len(rows)))["id"]] for rows in (splits.train, splits.valid["generic"]))
    assert 1 <= len(set(held)) <= 14, "6 of 300 are expected"
    assert not set(kept) & set(held)
    assert len(kept) + len(held) == len(document)
    assert list(splits.valid) == ["specific", "generic"], "the specific set decides"
    assert splits.held_out is splits.specific
    found = {name: packed(rows).text(0) for name, rows in
             (("train", splits.specific), ("valid", splits.valid["specific"]), ("test", splits.test["specific"]))}  # fmt: skip
    for name, row in found.items():
        assert (text / "specific" / f"{name}.txt").read_text().startswith(row)
    assert len({splits.hashes[n] for n in ("train", "specific", "valid_specific", "test_specific")}) == 4
    assert splits.classes == 0


def held_out_of(text: Path, lines: list[str]) -> set[str]:
    """Return the generic documents that are held out."""
    (text / "generic.txt").write_text("\n".join(lines))
    rows = splits_of(text, length=64).valid["generic"]
    assert isinstance(rows, RowView)
    return {packed(rows).text(int(i)) for i in rows.positions}


@pytest.mark.parametrize("sources", [2, 50])
def test_sources_that_take_turns_are_all_trained_on_and_held_out(text: Path, sources: int) -> None:
    lines = [f"source {i % sources} has written document {i} of 5000" for i in range(5000)]
    held = held_out_of(text, lines)
    assert 60 <= len(held) <= 140, "100 ± 10 are expected"
    count = [sum(line.startswith(f"source {k} ") for line in held) for k in range(sources)]
    assert max(count) < 5000 / sources, "no source is missing in train"
    assert sum(c > 0 for c in count) > sources / 2
    assert min(count) >= (30 if sources == 2 else 0)
    assert held_out_of(text, lines[::-2]) == held & set(lines[::-2]), "others do not count, nor does the order"


def test_equal_documents_are_held_out_together_and_one_always_is(text: Path) -> None:
    assert len(held_out_of(text, ["one document", "another document"] * 9)) == 1
    with pytest.raises(UserError, match=r"has 9 documents, too few different ones .* \(--data\.generic\)"):
        held_out_of(text, ["one document"] * 9)


def test_labels_are_known_for_each_row(text: Path) -> None:
    splits = splits_of(text, generic_labels=text / "labels.tsv")
    known = splits.known["domain"]
    assert sorted(known.names) == sorted(DOMAINS)
    assert not known.fault
    rows = splits.train.rows(np.arange(len(splits.train)))
    for tokens, length, i in zip(rows["tokens"], rows["length"], rows["id"], strict=True):
        row = tokens[:length].tobytes().decode()
        assert known.names[known.values[i]] == (DOMAINS[1] if row.upper() == row else DOMAINS[0])
    assert splits_of(text).known == {}


def test_faults_are_known_for_each_row(text: Path) -> None:
    """Those of lines 2, 5, 8, …, of documents with several rows each; of lines 0, 3, … nothing is known."""
    (text / "faults.tsv").write_text("".join(f"{word}\tx\n" for word in ("", "right", "1") * 100))
    splits = splits_of(text, generic_faults=text / "faults.tsv")
    known, generic = splits.known["fault"], packed(splits.train)
    assert (known.fault, known.taught, splits.taught) == (True, True, known)
    np.testing.assert_array_equal(known.values, np.asarray([-1, 0, 1])[generic.document % 3])
    assert splits_of(text).taught is None


@pytest.mark.slow
def test_mentornet_leaves_out_documents_that_are_like_known_faults(text: Path) -> None:
    """Every third document is noise; of a third of all it is known."""
    rng, lines = np.random.default_rng(0), (text / "generic.txt").read_text().splitlines()
    wrong = np.arange(len(lines)) % 3 == 2
    noise = ["".join(map(chr, rng.integers(33, 127, 40))) for _ in lines]
    (text / "generic.txt").write_text(
        "".join(f"{n if w else x}\n" for n, w, x in zip(noise, wrong, lines, strict=True))
    )
    named = np.where(np.arange(len(lines)) % 9 < 3, np.where(wrong, "wrong", "right"), "")
    (text / "faults.tsv").write_text("".join(f"{word}\n" for word in named))
    given = {"steps": 300, "batch_size": 16, "log_every": 50, "evaluate_every": 300, "checkpoint_every": 300}
    flags = text_flags(text, compare="uniform,mentornet", data__generic_faults=text / "faults.tsv", **given)
    uniform, mentor = compare("language_modeling", text / "run", **flags)
    assert uniform["share_at_end/fault"] > 0.09
    assert mentor["share_at_end/fault"] < uniform["share_at_end/fault"] / 2


def test_uniform_trains_on_specific_text_once_too(text: Path) -> None:
    """Held-out text is the specific text: named twice, its rows are there once."""
    given = {
        "data": {"generic": str(text / "generic.txt"), "specific": str(text / "specific"), "cache_dir": text / "cache"}
    }
    setting = setting_of(TASK, text / "run", given, {"uniform": {"also": ["specific", "held_out"]}})
    splits, plan = setting.splits, Run(setting.context("uniform", 0)).plan
    assert plan.rows is not None
    found, generic = plan.rows(), len(splits.train)
    assert len(found) == generic + len(splits.specific)
    rows = found.rows(np.arange(len(found)))
    np.testing.assert_array_equal(rows["id"][:generic], splits.train.rows(np.arange(generic))["id"])
    assert set(rows["id"][generic:]) == {-1}
    assert plan.about["trained_on"] == f"{generic:,} generic and {len(splits.specific):,} specific rows"


def test_rows_are_shown_as_text_with_their_domain(text: Path) -> None:
    config = config_of(text, generic_labels=text / "labels.tsv")
    splits = TASK.open(config, text)
    ids = splits.train.rows(np.asarray([0, 9]))["id"]
    shown = TASK.show(config, splits, ids)
    assert [type(x) for x in shown] == [Text, Text]
    for one, i in zip(shown, ids, strict=True):
        assert (one.text, one.label) == (packed(splits.train).text(int(i)), DOMAINS[int(one.text.isupper())])
    assert TASK.show(config_of(text), splits_of(text), ids)[0].label == ""


def test_rows_of_test_in_the_generic_text_are_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits_of(text, length=32)
    assert "warning" not in capsys.readouterr().err
    with (text / "generic.txt").open("a") as file:
        file.write((text / "specific" / "test.txt").read_text())
    splits_of(text, length=32)
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1
    assert "are also in" in error
    assert "or the test loss is too good" in error


def test_rows_of_test_in_the_specific_text_are_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (text / "specific" / "train.txt").open("a") as file:
        file.write((text / "specific" / "test.txt").read_text())
    splits_of(text, length=32)
    assert f"are also in {text}/specific (train): remove those" in capsys.readouterr().err


def test_the_field_is_that_of_the_data_with_fields(text: Path) -> None:
    lines = (text / "generic.txt").read_text().splitlines()
    (text / "generic.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    with_field = {"generic": str(text / "generic.jsonl"), "field": "body"}
    assert splits_of(text, **with_field).hashes == splits_of(text).hashes
    whole = splits_of(text, **with_field, documents="file")
    assert packed(whole.test["specific"]).document.max() == 0, "the plain text is one document a file"
    assert packed(whole.train).document.max() == 299
    with pytest.raises(UserError, match="plain text"):
        splits_of(text, generic=str(text / "specific"), field="body")


# -- networks and evaluation -----------------------------------------------------------------------------------------


def test_the_evaluation_is_all_nats_over_all_bytes(text: Path) -> None:
    with (text / "specific" / "test.txt").open("a") as file:
        file.write("A CAT\nRAIN\n")
    config = config_of(text)
    splits = TASK.open(config, text)
    model = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(model.init)(jax.random.key(0))
    rows = splits.test["specific"]
    evaluate = TASK.evaluate(config, splits, model)
    batch = rows.rows(np.arange(len(rows)))
    assert len(set(batch["length"])) > 1, "short rows count less"
    logits = np.asarray(jax.jit(Transformer(TINY).apply)({"params": params}, batch["tokens"]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["tokens"][..., None], -1)[..., 0]
    real = np.arange(LENGTH) < batch["length"][:, None]
    assert evaluate(params, state, rows, None)["loss"] == pytest.approx((nats * real).sum() / real.sum(), rel=1e-5)
    assert evaluate(params, state, rows, 5)["loss"] != evaluate(params, state, rows, None)["loss"]
    guess = jax.tree.map(jnp.zeros_like, params)
    assert evaluate(guess, state, rows, None)["loss"] == pytest.approx(math.log(256), rel=1e-5)


def test_the_last_blocks() -> None:
    shape = TransformerConfig(3, 8, 2, 16)
    paths = ["embedding", "block_0/mlp/kernel", "block_1/mlp/kernel", "block_2/mlp/kernel", "final_norm/scale"]
    assert [path for path in paths if last_blocks(2, shape)(path)] == paths[2:]
    for count in (0, 4):
        with pytest.raises(UserError, match=f"the last {count} blocks of a model that has 3: give 1 to 3"):
            last_blocks(count, shape)


def losses_and_gradient(text: Path, model: ModelConfig) -> tuple[Any, Any, Any]:
    config = config_of(text, model)
    splits = TASK.open(config, text)
    made = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(made.init)(jax.random.key(0))
    batch = splits.specific.rows(np.arange(4))

    def total(p: Any) -> Any:
        return made.loss(p, state, batch, jax.random.key(1))[0].sum()

    return made, params, jax.jit(jax.value_and_grad(total))(params)


def test_recomputed_and_scanned_blocks(text: Path) -> None:
    """Recomputing changes nothing; scanned blocks are one stack of parameters, of which no part can be probed."""
    plain, params, (loss, gradient) = losses_and_gradient(text, ModelConfig())
    _, _, (again, recomputed) = losses_and_gradient(text, ModelConfig(remat=True))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), recomputed, gradient)
    scanned, stacked, _ = losses_and_gradient(text, ModelConfig(scan_layers=True, remat=True))
    assert plain.part is not None
    assert scanned.part is None
    count, stack = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, stacked))
    assert count == stack
    assert (plain.gather, scanned.gather) == (None, None), "on one device nothing is gathered"


def test_dropout_is_for_training_alone(text: Path) -> None:
    """Generic and specific rows have it; evaluation, which also scores rows, does not. Without, all are one function."""
    config = config_of(text, ModelConfig(dropout=0.5))
    splits = TASK.open(config, text)
    model = TASK.model(config, splits, ModelOptions())
    plain = TASK.model(config_of(text), splits, ModelOptions())
    assert plain.loss is plain.specific_loss is plain.evaluation
    assert model.scoring is None, "rows are scored by the evaluation"
    params, state = jax.jit(model.init)(jax.random.key(0))
    rows = splits.specific.rows(np.arange(4))

    def losses(loss: Any, seed: int = 1) -> np.ndarray:
        return np.asarray(jax.jit(loss)(params, state, rows, jax.random.key(seed))[0])

    np.testing.assert_array_equal(losses(model.evaluation), losses(plain.loss))
    for trained in (model.loss, model.specific_loss):
        np.testing.assert_array_equal(losses(trained), losses(trained))
        assert np.abs(losses(trained) - losses(trained, 2)).max() > 1e-4
        assert np.abs(losses(trained) - losses(model.evaluation)).max() > 1e-4


def test_what_a_split_state_gathers(text: Path) -> None:
    """A model of scanned blocks gathers each block itself, and the step what lies before them."""
    mesh, config = sharding.make_mesh(), config_of(text, ModelConfig(scan_layers=True))
    splits = TASK.open(config, text)
    gather = TASK.model(config, splits, ModelOptions(mesh=mesh)).gather
    assert gather is not None
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(TASK.model(config, splits, ModelOptions()).init, jax.random.key(0))[0]
        )
    ]
    before = [path for path in paths if gather(path)]
    assert before
    assert not [path for path in before if "block" in path]
    assert TASK.model(config_of(text), splits, ModelOptions(mesh=mesh)).gather is None


@pytest.mark.parametrize(("forward", "attention"), [(False, "auto"), (True, "xla")])
def test_forward_mode_goes_without_fused_attention(
    forward: bool, attention: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel, which bfloat16 takes on a GPU, has no forward-mode derivative."""
    built: list[TransformerConfig] = []
    from bilevel.tasks import language_modeling

    def record(shape: TransformerConfig, *mesh: Any) -> Transformer:
        built.append(shape)
        return Transformer(shape, *mesh)

    monkeypatch.setattr(language_modeling, "Transformer", record)
    TASK.model(config_of(text), splits_of(text), ModelOptions(forward=forward, dtype="bfloat16"))
    assert {shape.attention for shape in built} == {attention}
    assert {shape.dtype for shape in built} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("kind", ["conv", "ngram"])
def test_weighting_networks_begin_without_preference(kind: Any, text: Path) -> None:
    config = config_of(text, ModelConfig(weighting=kind, weighting_layers=2, weighting_width=8))
    splits = TASK.open(config, text)
    network = TASK.weighting(config, splits)
    assert callable(network.logits)
    params, batch = jax.jit(network.init)(jax.random.key(0)), splits.train.rows(np.arange(6))
    score = jax.jit(network.logits)
    np.testing.assert_array_equal(score(params, batch), np.zeros(6, np.float32))
    assert ("conv_1" in params) == (kind == "conv")
    moved = {**params, "logit": jax.tree.map(jnp.ones_like, params["logit"])}
    logits = np.asarray(score(moved, batch))
    assert len(set(logits.round(6).tolist())) > 1
    longer = {**batch, "tokens": np.concatenate([batch["tokens"], np.full((6, 4), 7, np.uint8)], axis=1)}
    np.testing.assert_allclose(score(moved, longer), logits, rtol=1e-5, err_msg="padding has no influence")


@pytest.mark.slow
def test_convolutions_learn_weights(text: Path) -> None:
    """The paper's network, with settings that no other test has."""
    given = text_flags(text, compare="soba", model__weighting="conv", model__weighting_layers=2)
    more = {
        "soba__estimator": "softmax", "soba__alpha_batch": "uniform", "soba__alpha_batch_size": 8, "soba__tracker": "momentum",
        "soba__filter": "importance", "soba__min_effective_fraction": 0.2,
    }  # fmt: skip
    compare("language_modeling", text / "run", **given, **more)
    assert metrics_of(text / "run" / "soba-seed0")[-1]["effective_sample_size"] >= 0.2 * 16 * 0.999
