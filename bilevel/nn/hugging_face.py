"""Parameters of a `Decoder` in the layout of Hugging Face's Llama, Mistral, Qwen2 and Qwen3: config.json and safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.files import appearing, read_arrays, save_arrays
from bilevel.nn.decoder import Decoder, DecoderConfig, StretchedPositions
from bilevel.types import Params, UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOST_BYTES = 5 * 10**9
"""Of one file of parameters that is written, as `transformers` has it."""
_BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight", "head": "lm_head.weight"}
_PARTS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "query": "self_attn.q_proj",
    "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj", "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Ends of the names of what files hold and the model does not need: angles, and the head of tied ones."""


def read_settings(place: Path) -> dict[str, Any]:
    """Read a config.json, or that of a folder.

    Raises:
      UserError: there is none, or it holds no JSON object.
    """
    file = place / CONFIG if place.is_dir() else place
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give the folder of a model, with its {CONFIG}."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object; give the {CONFIG} of a model.")
    return found


def config_of(settings: Mapping[str, Any], name: str) -> DecoderConfig:
    """Return the shape of the decoder that a config.json describes.

    Args:
      settings: from `read_settings`.
      name: the file or folder, for messages.

    Raises:
      UserError: it is of another kind of model, or lacks something.
    """
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{name} is a model of the type {family}: those that are read are {', '.join(FAMILIES)}.")
    if settings.get("hidden_act", "silu") != "silu":
        raise UserError(f"{name} has hidden_act {settings['hidden_act']}: only silu is read.")
    try:
        heads, width = (_count(settings, name) for name in ("num_attention_heads", "hidden_size"))
        bias, rotary = bool(settings.get("attention_bias", False)), settings.get("rope_parameters") or {}
        starts = [settings.get(f"{which}_token_id") for which in ("bos", "eos")]
        return DecoderConfig(
            vocabulary=_count(settings, "vocab_size"),
            layers=_count(settings, "num_hidden_layers"),
            width=width,
            heads=heads,
            groups=settings.get("num_key_value_heads") or heads,
            head_width=settings.get("head_dim") or width // heads,
            feed_forward=_count(settings, "intermediate_size"),
            rotary_base=float(rotary.get("rope_theta", settings.get("rope_theta", 10_000.0))),
            stretched=_stretched(settings.get("rope_scaling") or rotary, name),
            epsilon=settings.get("rms_norm_eps", 1e-6),
            tied=bool(settings.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            out_bias=bias,
            mlp_bias=bool(settings.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            start=next((one for found in starts for one in _several(found)), 0),
            longest=_longest(settings),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"The {CONFIG} of {name} cannot be used: {what}.") from error


def _count(settings: Mapping[str, Any], name: str) -> int:
    if not isinstance(found := settings[name], int) or found < 1:
        raise ValueError(f"{name} is {found}")
    return found


def _several(found: Any) -> Sequence[int]:
    return found if isinstance(found, list) else [] if found is None else [found]


def _longest(settings: Mapping[str, Any]) -> int | None:
    """Rows up to here are not cut by a sliding window."""
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    known = [size for size in (settings.get("max_position_embeddings"), window) if size is not None]
    return min(known, default=None)


def _stretched(scaling: Mapping[str, Any], name: str) -> StretchedPositions | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return StretchedPositions(scaling["factor"])
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return StretchedPositions(scaling["factor"], low, high, scaling["original_max_position_embeddings"])
    raise UserError(f"{name} has rotary positions of the type {kind}: those that are read are default, linear, llama3.")


def has_parameters(folder: Path) -> bool:
    """Whether a folder has files of parameters."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def parameter_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its parameters.

    Raises:
      UserError: there are none, or one of them is missing.
    """
    if (folder / INDEX).is_file():
        names = read_settings(folder / INDEX).get("weight_map", {}).values()
        found = [folder / name for name in dict.fromkeys(names)]
        for file in found:
            if not file.is_file():
                raise UserError(f"{file} is missing, which {INDEX} names; copy the folder again.")
        return found
    if not has_parameters(folder):
        raise UserError(
            f"The folder {folder} holds no {WEIGHTS} and no {INDEX}; save the model as safetensors there, as save_pretrained "
            "of transformers does."
        )
    return [folder / WEIGHTS]


def shapes_of(config: DecoderConfig) -> Params:
    """Return the shapes of a decoder's parameters."""
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def read_parameters(folder: Path, config: DecoderConfig) -> Params:
    """Read the parameters of a decoder as numpy arrays, float32.

    Raises:
      UserError: a file is missing or damaged, or its parameters are not those of `config`; the first that differs is named.
    """
    found: dict[str, NDArray[Any]] = {}
    for file in parameter_files(folder):
        found |= read_arrays(file)
    wanted = dict(_stored_shapes(config))
    for name, shape in wanted.items():
        has = list(found[name].shape) if name in found else "missing"
        if has != list(shape):
            raise UserError(
                f"{folder} does not fit its {CONFIG}: {name} is {has}, and {list(shape)} is needed; copy it again."
            )
    for name in found:
        if name not in wanted and not name.endswith(_UNUSED):
            raise UserError(f"{folder} holds {name}, which its {CONFIG} does not say: that kind of model is not read.")
    return flax.traverse_util.unflatten_dict(
        {path: _leaf(path, config, found) for path in _flat(shapes_of(config))}, sep="/"
    )


def _flat(params: Params) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")  # pyright: ignore[reportReturnType]


def _leaf(path: str, config: DecoderConfig, found: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    parts = [np.asarray(found[name], np.float32) for name in _names(path, config)]
    parts = [np.ascontiguousarray(x.T) if path.endswith("kernel") else x for x in parts]
    return np.stack(parts) if path.startswith("blocks/") else parts[0]


def _names(path: str, config: DecoderConfig) -> list[str]:
    """The names of a parameter in the files: one, or that of each layer if these are stacked."""
    if path in _OUTER:
        return [_OUTER[path]]
    block, part, kind = path.split("/")
    end = f"{_PARTS[part]}.{'bias' if kind == 'bias' else 'weight'}"
    layers = range(config.layers) if block == "blocks" else [int(block.removeprefix("block_"))]
    return [f"model.layers.{i}.{end}" for i in layers]


def _stored_shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in _flat(shapes_of(config)).items():
        shape = leaf.shape[1:] if path.startswith("blocks/") else leaf.shape
        yield from ((name, shape[::-1] if path.endswith("kernel") else shape) for name in _names(path, config))


def files_beside(place: Path) -> list[Path]:
    """Return the files beside a model's config.json that hold no parameters: those of its tokenizer, and how it generates."""
    folder = place if place.is_dir() else place.parent
    return [folder / name for name in _BESIDE if (folder / name).is_file()]


def write_folder(
    folder: Path,
    settings: Mapping[str, Any],
    params: Params,
    *,
    dtype: str = "float32",
    beside: Sequence[Path] = (),
    most_bytes: int = MOST_BYTES,
) -> None:
    """Write a model in the layout that `read_parameters` and `transformers` read.

    Args:
      folder: made if it does not exist; files in it with the names of a model's are replaced.
      settings: those of its config.json, of which only the type of the parameters is changed.
      params: the parameters.
      dtype: type that they are stored in.
      beside: files that are copied, such as a tokenizer's.
      most_bytes: largest file of parameters; if there are more, they are split, with an index.

    Raises:
      UserError: a file cannot be written.
    """
    config, kind = config_of(settings, str(folder)), jnp.dtype(dtype)
    arrays: dict[str, NDArray[Any]] = {}
    for path, leaf in _flat(params).items():
        stored = np.asarray(leaf, np.float32)
        layers = stored if path.startswith("blocks/") else stored[None]
        for name, x in zip(_names(path, config), layers, strict=True):
            arrays[name] = np.ascontiguousarray(x.T if path.endswith("kernel") else x).astype(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (WEIGHTS, INDEX):
            (folder / file).unlink(missing_ok=True)
        for file in beside:
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise UserError(
            f"Cannot write the model to {folder} ({error.strerror or error}): choose another one."
        ) from error
    groups = _grouped(arrays, most_bytes)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file, group in zip(names if len(groups) > 1 else [WEIGHTS], groups, strict=True):
        save_arrays(folder / file, {name: arrays[name] for name in group}, {"format": "pt"})
    if len(groups) > 1:
        total = sum(x.nbytes for x in arrays.values())
        where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    named = "dtype" if "dtype" in settings else "torch_dtype"
    _write_json(folder / CONFIG, {**settings, named: kind.name})


def _grouped(arrays: Mapping[str, NDArray[Any]], most: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, x in arrays.items():
        if groups[-1] and size + x.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += x.nbytes
    return groups


def _write_json(file: Path, value: Any) -> None:
    with appearing(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
