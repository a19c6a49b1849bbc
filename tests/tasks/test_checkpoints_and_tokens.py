"""Language models that begin with a checkpoint, and text in the tokens of a tokenizer, as a user calls them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from commands import compare, flags, metrics_of, refused, results
from study_calls import two_processes
from tiny_decoder import reference_logits, stored, write_checkpoint
from tiny_text import text_flags, write_texts
from tiny_tokenizers import write_json_tokenizer, write_sentencepieces
from traced import fitting, setting_of, trace

from bilevel import cli
from bilevel.devices import sharding
from bilevel.study import ModelOptions
from bilevel.study.fitting import fit_of
from bilevel.study.run import Run
from bilevel.tasks.language_modeling import TASK, DataConfig, LanguageConfig, ModelConfig
from bilevel.types import UserError

LENGTH = 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny random checkpoint with its tokenizer."""
    write_json_tokenizer(tmp_path / "model")
    write_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=2)
    return tmp_path / "model"


def llama_flags(text: Path, model: Path, **given: Any) -> dict[str, Any]:
    return text_flags(
        text, model__network="llama", model__start_from=model, data__tokenizer=model, compare="soba", **given
    )


def exported(run: Path, output: Path, **given: Any) -> Path:
    more = [x for name, value in given.items() for x in (f"--{name}", str(value))]
    cli.main(["export", "--run", str(run), "--output", str(output), *more])
    return output


def test_a_checkpoint_is_continued_and_written(text: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read, continued with SOBA, written: the file gives the model's losses in the reference."""
    (row,) = compare("language_modeling", text / "run", **llama_flags(text, model))
    run = text / "run" / "soba-seed0"
    out = exported(run, text / "out")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    before, after = stored(model), stored(out)
    assert before.keys() == after.keys()
    moved = max(np.abs(after[name] - x).max() for name, x in before.items())
    assert 1e-4 < moved < 0.1, "it began with the checkpoint, and learned"
    assert before["model.embed_tokens.weight"].std() > 0.2, "far from random beginnings"

    config = LanguageConfig(
        DataConfig(
            generic=str(text / "generic.txt"), specific=str(text / "specific"), length=LENGTH, tokenizer=str(out),
            cache_dir=text / "cache",
        )
    )  # fmt: skip
    rows = TASK.open(config, text).test["specific"]
    batch = rows.rows(np.arange(len(rows)))
    inputs = np.concatenate([np.full((len(rows), 1), 7), batch["tokens"][:, :-1]], axis=1)
    logits = reference_logits(out, inputs.astype(int))
    chosen = np.take_along_axis(logits, batch["tokens"].astype(int)[..., None], -1)[..., 0]
    nats = (np.log(np.exp(logits).sum(-1)) - chosen) * (np.arange(LENGTH) < batch["length"][:, None])
    assert row["test_loss"] == pytest.approx(nats.sum() / batch["size"].sum(), rel=1e-5)
    assert row["test_token_loss"] == pytest.approx(nats.sum() / batch["length"].sum(), rel=1e-5)
    table = (text / "run" / "comparison.md").read_text()
    assert "Loss in nats per byte; loss of a token in nats per token" in table
    with pytest.raises(SystemExit):
        exported(run, text / "tuned", of="finetuned")
    assert "has no fine-tuned parameters: give --of end" in capsys.readouterr().err


def test_training_begins_with_the_checkpoint(text: Path, model: Path) -> None:
    """Before the first step the losses are those of the reference, for uniform and a fit alike."""
    given = {
        "data": {"generic": str(text / "generic.txt"), "specific": str(text / "specific"), "length": LENGTH,
                 "cache_dir": text / "cache", "tokenizer": str(model)},
        "model": {"network": "llama", "start_from": model, "weighting_width": 8},
    }  # fmt: skip
    setting = setting_of(TASK, text / "run", given)
    run = Run(setting.context("uniform", 0))
    state = run.parts[1]
    np.testing.assert_array_equal(state.params["embedding"], stored(model)["model.embed_tokens.weight"])
    fresh = run.plan.init(*jax.random.split(jax.random.key(0), 3))
    assert np.abs(np.asarray(fresh.params["embedding"])).max() < 0.2
    begun = fit_of(
        setting.config.study, setting.mesh, setting.context("uniform", 0).model(), lambda *_: {}, setting.splits.specific,
        setting.splits.deciding, {}, steps=1, seed=0,
    ).begin()  # fmt: skip
    np.testing.assert_array_equal(begun[0]["embedding"], state.params["embedding"])
    assert set(setting.splits.hashes) >= {"train", "start_config.json", "start_model.safetensors"}


@pytest.mark.slow
def test_every_method_continues_from_a_checkpoint(text: Path, model: Path) -> None:
    """Its step on tokens is traced, forward-mode derivatives included."""
    given = {
        "data": {"generic": str(text / "generic.txt"), "specific": str(text / "specific"), "length": LENGTH,
                 "cache_dir": text / "cache", "tokenizer": str(model)},
        "model": {"network": "llama", "start_from": model, "weighting_width": 8},
    }  # fmt: skip
    setting = setting_of(TASK, text / "run", given, {"contrastive": {"fraction": 0.1, "rows": 100}})
    methods = fitting(setting)
    assert len(methods) > 8
    for method in methods:
        trace(setting, method)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_a_checkpoint_split_over_devices_trains_the_same(
    scanned: bool, text: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, original = [], sharding.split_state
    monkeypatch.setattr(
        sharding, "split_state", lambda mesh, state: split.append(mesh.size) or original(mesh, state, min_size=384)
    )
    given = llama_flags(text, model, batch_size=8, **({"model__scan_layers": True} if scanned else {}))
    (alone,) = compare("language_modeling", text / "run", **given)
    mesh = sharding.make_mesh()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), mesh.axis_names, axis_types=mesh.axis_types)
    monkeypatch.setattr(sharding, "make_mesh", lambda *devices: mesh)
    (over,) = compare("language_modeling", text / "split", **given, shard_state=True)
    assert split[:2] == [8] * 2, "what was read, and the state"
    for name in ("test_loss", "valid_loss/generic"):
        assert over[name] == pytest.approx(alone[name], rel=1e-4), name
    one, other = (stored(exported(text / run / "soba-seed0", text / f"of-{run}")) for run in ("run", "split"))
    for name, x in one.items():
        np.testing.assert_allclose(other[name], x, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_begin_with_a_checkpoint(text: Path, model: Path) -> None:
    """Each reads it and holds half of its embedding; what the first one writes is what one process writes."""
    write_checkpoint(model, "qwen3", num_hidden_layers=2, hidden_size=64)
    given = llama_flags(text, model, batch_size=8, big_batch_size=32, finetune__steps=4, resident="never")
    two_processes("compare", "language_modeling", *flags(text / "two", **given, shard_state=True))
    (two,), (one,) = results(text / "two"), compare("language_modeling", text / "one", **given)
    for name in ("test_loss", "valid_loss/generic", "finetuned_test_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    first, other = (stored(exported(text / run / "soba-seed0", text / f"of-{run}")) for run in ("one", "two"))
    for name, x in first.items():
        np.testing.assert_allclose(other[name], x, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_the_best_of_fine_tuning_is_written_too(text: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = llama_flags(text, model, finetune__steps=4)
    compare("language_modeling", text / "run", **given)
    run = text / "run" / "soba-seed0"
    end, tuned = (stored(exported(run, text / of, of=of)) for of in ("end", "finetuned"))
    assert any(np.abs(tuned[name] - x).max() > 0 for name, x in end.items())


def test_a_shape_alone_begins_at_random(text: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    config = LanguageConfig(
        DataConfig(
            generic=str(text / "generic.txt"), specific=str(text / "specific"), length=LENGTH, tokenizer=str(model),
            cache_dir=text / "cache",
        ),
        ModelConfig(network="llama", shape=model / "config.json"),
    )  # fmt: skip
    splits = TASK.open(config, text)
    built = TASK.model(config, splits, ModelOptions())
    assert built.start is None
    assert built.part is not None
    assert built.part(1)("block_1/query/kernel")
    shapes = jax.eval_shape(built.init, jax.random.key(0))[0]
    assert shapes["embedding"].shape == (300, 16)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": (
        {"model__network": "llama"},
        "--model.network llama and neither of --model.start-from and --model.shape",
    ),
    "no such folder": (
        {"model__network": "llama", "model__start_from": "nowhere"},
        "--model.start-from: The folder nowhere holds no model.safetensors",
    ),
    "another network": ({"model__start_from": "MODEL"}, "--model.start-from is for --model.network llama, not xs"),
    "a small vocabulary": (
        {"model__network": "llama", "model__start_from": "SMALL", "data__tokenizer": "MODEL"},
        "knows 100 tokens, and --data.tokenizer",
    ),
    "bytes for a model of tokens": (
        {"model__network": "llama", "model__start_from": "MODEL"},
        "has a tokenizer, tokenizer.json: give --data.tokenizer MODEL",
    ),
    "long rows": (
        {"model__network": "llama", "model__start_from": "MODEL", "data__tokenizer": "MODEL", "data__length": 65},
        "--data.length 65 is more than the 64 tokens",
    ),
    "no tokenizer": ({"data__tokenizer": "nowhere"}, "The tokenizer nowhere does not exist"),
    "no tokenizer in a folder": ({"data__tokenizer": "SMALL"}, "holds no tokenizer.json or tokenizer.model"),
    "not a tokenizer": ({"data__tokenizer": "SMALL/config.json"}, "config.json is not a tokenizer.json"),
    "not a sentencepiece model": ({"data__tokenizer": "SMALL/model.safetensors"}, "is not a sentencepiece model"),
    "prompts across documents": (
        {"data__prompt_field": "question", "data__crossing": True},
        "--data.crossing does not go with --data.prompt-field",
    ),
    "prompts of plain text": ({"data__prompt_field": "question"}, "is plain text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(
    case: str, text: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, message = BAD[case]
    write_checkpoint(text / "SMALL", vocab_size=100)
    model.rename(text / "MODEL")
    monkeypatch.chdir(text)
    assert message in refused("language_modeling", text / "run", capsys, **text_flags(text, compare="soba", **given))


def test_what_cannot_be_exported_is_said(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exported(text, text / "out")
    assert "holds no config.yaml" in capsys.readouterr().err
    with pytest.raises(UserError, match="the network xs has no layout that others read"):
        TASK.export(LanguageConfig(), cast(Any, None), {}, text / "out", "float32")


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_tokens_are_trained_on_and_selected_by(kind: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of tokens and bytes differ by the bytes of a token; a corpus is scored in the run's tokens."""
    write = write_json_tokenizer if kind == "json" else write_sentencepieces
    tokenizer = write(text / "tokenizer")
    given = text_flags(text, compare="soba", data__tokenizer=tokenizer, model__weighting="conv")
    (row,) = compare("language_modeling", text / "run", **given)
    manifest = [json.loads(file.read_text()) for file in (text / "cache").glob("tokens-*/manifest.json")]
    assert {m["tokenizer"] for m in manifest} == {str(tokenizer)}
    assert 1.2 < row["test_token_loss"] / row["test_loss"] < 10
    assert math.isfinite(row["valid_loss/generic"])
    assert "generic valid loss of a token" in (text / "run" / "comparison.md").read_text()
    assert metrics_of(text / "run" / "soba-seed0")
    corpus, run = text / "generic.txt", text / "run" / "soba-seed0"
    cli.main(["select", "--weights", str(run), "--corpus", str(corpus), "--output", str(text / "kept"), "--keep-count", "9",
              "--no-progress"])  # fmt: skip
    assert "Kept 9 of 300 documents" in capsys.readouterr().out


def test_the_vocabulary_is_that_of_the_tokenizer(text: Path) -> None:
    tokenizer = write_json_tokenizer(text / "tokenizer")
    data = DataConfig(
        generic=str(text / "generic.txt"), specific=str(text / "specific"), length=LENGTH, tokenizer=str(tokenizer),
        cache_dir=text / "cache",
    )  # fmt: skip
    for weighting in ("conv", "ngram"):
        config = LanguageConfig(data, ModelConfig(weighting=weighting, weighting_width=8))
        splits = TASK.open(config, text)
        assert splits.tokenizer is not None
        size = splits.tokenizer.size
        assert size > 256
        built = TASK.model(config, splits, ModelOptions())
        assert jax.eval_shape(built.init, jax.random.key(0))[0]["embedding"].shape[0] == size
        network = TASK.weighting(config, splits)
        assert callable(network.logits)
        params = jax.jit(network.init)(jax.random.key(0))
        params = jax.tree.map(lambda x: x + 0.1, params)
        batch = splits.train.rows(np.arange(6))
        logits = np.asarray(jax.jit(network.logits)(params, batch))
        assert len(set(logits.round(6).tolist())) > 1


def write_sums(text: Path) -> DataConfig:
    """Questions and answers."""
    rng = np.random.default_rng(0)
    (text / "skill").mkdir()
    for name, count in (("generic", 300), ("skill/train", 60), ("skill/valid", 20), ("skill/test", 20)):
        lines = [json.dumps({"q": f"{a} plus {b} = ", "a": f"{a + b}"}) for a, b in rng.integers(0, 500, (count, 2))]
        (text / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return DataConfig(
        generic=str(text / "generic.jsonl"), specific=str(text / "skill"), length=24, field="a", prompt_field="q",
        cache_dir=text / "cache",
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [False, True])
def test_losses_of_answers_alone(tokens: bool, text: Path) -> None:
    """A model of answers is judged by answers, in bytes as in tokens."""
    data = write_sums(text)
    if tokens:
        data = dataclasses.replace(data, tokenizer=str(write_json_tokenizer(text / "tokenizer")))
    config = LanguageConfig(data, ModelConfig(weighting_width=8))
    splits = TASK.open(config, text)
    rows = splits.test["specific"].rows(np.arange(20))
    answers = [json.loads(line)["a"] for line in (text / "skill" / "test.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(rows["size"], [len(a) for a in answers])
    for row, length, first, answer in zip(rows["tokens"], rows["length"], rows["given"], answers, strict=True):
        part = row[first:length]
        shown = part.tobytes().decode() if splits.tokenizer is None else splits.tokenizer.decode(part)
        assert shown == answer
    model = TASK.model(config, splits, ModelOptions())
    params, state = jax.jit(model.init)(jax.random.key(0))
    guess = jax.tree.map(np.zeros_like, params)
    found = TASK.evaluate(config, splits, model)(guess, state, splits.test["specific"], None)
    count, size = (rows["length"] - rows["given"]).sum(), sum(map(len, answers))
    nats = math.log(256 if splits.tokenizer is None else splits.tokenizer.size)
    wanted = {"loss": nats * count / size} | ({"token_loss": nats} if tokens else {})
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_a_skill_is_learned_from_answers(text: Path) -> None:
    write_sums(text)
    given = text_flags(
        text, compare="soba", data__generic=text / "generic.jsonl", data__specific=text / "skill", data__field="a",
        data__prompt_field="q", data__length=24,
    )  # fmt: skip
    (row,) = compare("language_modeling", text / "run", **given)
    assert 0 < row["test_loss"] < 7
    assert "test_token_loss" not in row, "a byte is a token"


def test_rows_that_cross_documents_keep_held_out_ones_apart(text: Path) -> None:
    data = DataConfig(
        generic=str(text / "generic.txt"), specific=str(text / "specific"), length=LENGTH, crossing=True,
        cache_dir=text / "cache",
    )  # fmt: skip
    splits = TASK.open(LanguageConfig(data), text)
    lines = (text / "generic.txt").read_text().splitlines()

    def shown(rows: Any) -> str:
        batch = rows.rows(np.arange(len(rows)))
        return "".join(x[:n].tobytes().decode() for x, n in zip(batch["tokens"], batch["length"], strict=True))

    train, held = shown(splits.train), shown(splits.valid["generic"])
    assert {*train.split("\0")[:-1]} | {*held.split("\0")[:-1]} <= {*lines}
    count = train.count("\0") + held.count("\0")
    assert len(lines) - 2 <= count <= len(lines), "a last row that is short is dropped"
    assert not {*train.split("\0")[:-1]} & {*held.split("\0")[:-1]}
    batch = splits.train.rows(np.arange(len(splits.train)))
    assert (batch["size"] < batch["length"]).any()
    assert batch["size"].sum() == len(train) - train.count("\0")
