"""The decoder against a forward pass in numpy and against transformers, its derivatives, and its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import FAMILIES, SETTINGS, reference_logits, stored, write_checkpoint

from bilevel.nn.decoder import Decoder
from bilevel.nn.hugging_face import config_of, read_parameters, read_settings, write_folder
from bilevel.nn.transformer import language_model_loss, last_blocks
from bilevel.types import UserError

LENGTH = 24


def tokens_of(settings: dict[str, Any], rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, settings["vocab_size"], (rows, LENGTH))


def opened(folder: Path, **given: Any) -> tuple[Decoder, Any]:
    config = dataclasses.replace(config_of(read_settings(folder), "it"), **given)
    return Decoder(config), read_parameters(folder, config)


def logits_of(folder: Path, tokens: np.ndarray, **given: Any) -> np.ndarray:
    model, params = opened(folder, **given)
    return np.asarray(jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))(params, tokens))


def wanted_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The reference sees the token of the beginning, and not the last one."""
    start = config_of(read_settings(folder), "it").start
    return reference_logits(folder, np.concatenate([np.full((len(tokens), 1), start), tokens[:, :-1]], axis=1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scanned", [False, True])
def test_logits_are_those_of_the_reference(family: str, scanned: bool, tmp_path: Path) -> None:
    settings = write_checkpoint(tmp_path, family, files=3 if scanned else 1)
    tokens = tokens_of(settings)
    wanted = wanted_logits(tmp_path, tokens)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(logits_of(tmp_path, tokens, scan_layers=scanned), wanted, atol=2e-5)


def test_the_token_before_the_first_position() -> None:
    for given, start in (({}, 1), ({"bos_token_id": None}, 2), ({"bos_token_id": None, "eos_token_id": [7, 2]}, 7)):
        assert config_of({**SETTINGS, **given}, "it").start == start


@pytest.mark.parametrize("family", ["llama with biases", "qwen3"])
@pytest.mark.parametrize("scanned", [False, True])
def test_what_is_written_is_what_was_read(family: str, scanned: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", family)
    settings = read_settings(tmp_path / "in")
    _, params = opened(tmp_path / "in", scan_layers=scanned)
    for most, split in ((10**9, False), (20_000, True)):
        out = tmp_path / f"out-{most}"
        write_folder(out, settings, params, most_bytes=most)
        sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
        assert (len(sizes) > 1, (out / "model.safetensors.index.json").exists()) == (split, split)
        assert max(sizes) < most + 2000
        assert read_settings(out) == settings
        before, after = stored(tmp_path / "in"), stored(out)
        assert before.keys() == after.keys()
        for name, x in before.items():
            np.testing.assert_array_equal(after[name], x, err_msg=name)
        again = opened(out, scan_layers=scanned)[1]
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(one, other)


def test_half_precision_is_read_and_written(tmp_path: Path) -> None:
    settings = write_checkpoint(tmp_path / "in")
    _, params = opened(tmp_path / "in")
    write_folder(tmp_path / "half", settings, params, dtype="bfloat16")
    assert read_settings(tmp_path / "half")["torch_dtype"] == "bfloat16"
    assert {x.dtype.name for x in stored(tmp_path / "half").values()} == {"bfloat16"}
    _, halved = opened(tmp_path / "half")
    assert {x.dtype for x in jax.tree.leaves(halved)} == {np.dtype(np.float32)}
    for one, other in zip(jax.tree.leaves(halved), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16).astype(np.float32))


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from bilevel.nn.hugging_face import files_beside

    settings = write_checkpoint(tmp_path / "in")
    for name in ("tokenizer.json", "generation_config.json", "trainer_state.json"):
        (tmp_path / "in" / name).write_text("{}")
    beside = files_beside(tmp_path / "in")
    write_folder(tmp_path / "out", settings, opened(tmp_path / "in")[1], beside=beside)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}


def test_forward_mode_derivatives(tmp_path: Path) -> None:
    """Those of the losses along a direction are those of reverse mode."""
    settings = write_checkpoint(tmp_path)
    model, params = opened(tmp_path, attention="xla")
    tokens = tokens_of(settings, 3)
    batch = {"tokens": jnp.asarray(tokens), "length": jnp.asarray([LENGTH, 9, 1])}
    loss = language_model_loss(model)

    def losses(params: Any) -> Any:
        return loss(params, {}, batch, jax.random.key(0))[0]

    along = jax.tree.map(jnp.cos, params)
    found = jax.jit(lambda params: jax.jvp(losses, (params,), (along,))[1])(params)
    rows = jax.jit(jax.jacrev(losses))(params)
    wanted = sum(
        jnp.sum((j * d).reshape(3, -1), axis=1) for j, d in zip(*map(jax.tree.leaves, (rows, along)), strict=True)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_token_changes_only_what_follows_it_and_prompts_do_not_count(tmp_path: Path) -> None:
    settings = write_checkpoint(tmp_path, "qwen2")
    model, params = opened(tmp_path)
    tokens = tokens_of(settings)
    changed = tokens.copy()
    changed[:, 10] += 1
    logits, others = logits_of(tmp_path, tokens), logits_of(tmp_path, changed % settings["vocab_size"])
    np.testing.assert_array_equal(logits[:, :11], others[:, :11])
    assert np.abs(logits[:, 11:] - others[:, 11:]).max() > 1e-3
    batch = {"tokens": tokens, "length": np.array([20, 24]), "given": np.array([0, 6])}
    losses, _ = jax.jit(language_model_loss(model))(params, {}, batch, jax.random.key(0))
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, [nats[0, :20].mean(), nats[1, 6:].mean()], rtol=1e-5)


def test_the_last_blocks_and_the_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model, params = opened(tmp_path)
    chosen = last_blocks(1, model.config)
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    kept = {path.partition("/")[0] for path in paths if chosen(path)}
    assert kept == {"block_1", "final_norm", "head"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"model_type": "gemma2"}, "is a model of the type gemma2: those that are read are llama, mistral"),
    "another activation": ({"hidden_act": "gelu"}, "has hidden_act gelu"),
    "other positions": ({"rope_scaling": {"rope_type": "yarn"}}, "rotary positions of the type yarn"),
    "no width": ({"hidden_size": None}, r"The config\.json of it cannot be used: hidden_size is None"),
    "no room for groups": ({"num_key_value_heads": 3}, "4 heads must be a multiple of its 3 heads of keys"),
    "another size": ({"intermediate_size": 32}, r"mlp.down_proj.weight is \[16, 24\], and \[16, 32\] is needed"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds model.layers.1.input_layernorm.weight, which its config.json"),
    "more layers": ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    "biases": ({"attention_bias": True}, "k_proj.bias is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    given, message = BAD[case]
    settings = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, **given}))
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read \(No such file"):
        read_settings(tmp_path)
    settings = write_checkpoint(tmp_path, files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002\.safetensors is missing, which model\.safetensors\.index"):
        opened(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors and no"):
        read_parameters(tmp_path, config_of(settings, "it"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_agrees(family: str, tmp_path: Path) -> None:
    """A model that transformers made and saved gives its logits; so does, in transformers, what we write."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_checkpoint(tmp_path / "in", family)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "in"))
    with torch.no_grad():
        for x in made.parameters():
            x.add_(0.2 * torch.randn_like(x))
    made.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    settings = read_settings(tmp_path / "theirs")
    tokens = tokens_of(settings)
    start = config_of(settings, "it").start
    inputs = np.concatenate([np.full((len(tokens), 1), start), tokens[:, :-1]], axis=1)

    def theirs(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model.float().eval()(torch.from_numpy(inputs)).logits.numpy()

    np.testing.assert_allclose(logits_of(tmp_path / "theirs", tokens), theirs(made), atol=3e-5)
    _, params = opened(tmp_path / "theirs")
    write_folder(tmp_path / "ours", settings, params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(theirs(loaded), theirs(made), atol=1e-6)
