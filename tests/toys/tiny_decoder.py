"""Tiny random checkpoints in Hugging Face's layout, and their logits by a forward pass in numpy, float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SETTINGS: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
}  # fmt: skip
QWEN: dict[str, Any] = {"bos_token_id": None, "eos_token_id": [7, 2], "tie_word_embeddings": True}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3": {"rope_scaling": LLAMA_3, "tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **QWEN},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 6, **QWEN},
}


def write_checkpoint(folder: Path, family: str = "llama", files: int = 1, **given: Any) -> dict[str, Any]:
    """Write config.json and random parameters, in one file or several; returns the settings."""
    settings = {**SETTINGS, **FAMILIES[family], **given}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    arrays = random_arrays(settings)
    if files == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return settings
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(arrays)}
    for file in sorted(set(where.values())):
        save_file({name: x for name, x in arrays.items() if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return settings


def random_arrays(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    s, rng = settings, np.random.default_rng(0)
    width, hidden, kind = s["hidden_size"], s["intermediate_size"], s["model_type"]
    heads, groups = (s[f"num_{name}_heads"] * s["head_dim"] for name in ("attention", "key_value"))
    bias = {name: s["attention_bias"] or (kind == "qwen2" and name != "o") for name in "qkvo"}
    found: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        found[name] = (around + 0.3 * rng.normal(size=shape)).astype(np.float32)

    add("model.embed_tokens.weight", s["vocab_size"], width)
    for i in range(s["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{norm}.weight", width, around=1.0)
        for name, rows, columns in (
            ("q", heads, width),
            ("k", groups, width),
            ("v", groups, width),
            ("o", width, heads),
        ):
            add(f"{layer}.self_attn.{name}_proj.weight", rows, columns)
            if bias[name]:
                add(f"{layer}.self_attn.{name}_proj.bias", rows)
        if kind == "qwen3":
            for name in "qk":
                add(f"{layer}.self_attn.{name}_norm.weight", s["head_dim"], around=1.0)
        for name, rows, columns in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
            add(f"{layer}.mlp.{name}_proj.weight", rows, columns)
            if s["mlp_bias"]:
                add(f"{layer}.mlp.{name}_proj.bias", rows)
    add("model.norm.weight", width, around=1.0)
    if not s["tie_word_embeddings"]:
        add("lm_head.weight", s["vocab_size"], width)
    return found


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All parameters of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def reference_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of what follows each of the tokens `[b, T]`, float64 `[b, T, V]`, written after the papers."""
    s = json.loads((folder / "config.json").read_text())
    p = {name: x.astype(np.float64) for name, x in stored(folder).items()}
    x = p["model.embed_tokens.weight"][tokens]
    for i in range(s["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = x + _attention(s, p, f"{layer}.self_attn", _norm(s, p[f"{layer}.input_layernorm.weight"], x))
        h = _norm(s, p[f"{layer}.post_attention_layernorm.weight"], x)
        gate, up = (_linear(p, f"{layer}.mlp.{name}_proj", h) for name in ("gate", "up"))
        x = x + _linear(p, f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = "model.embed_tokens.weight" if s["tie_word_embeddings"] else "lm_head.weight"
    return _norm(s, p["model.norm.weight"], x) @ p[head].T


def _linear(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def _norm(s: dict[str, Any], scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + s["rms_norm_eps"]) * scale


def _attention(s: dict[str, Any], p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    width, length = s["head_dim"], x.shape[1]
    q, k, v = (
        _linear(p, f"{name}.{part}_proj", x).reshape(*x.shape[:2], -1, width).swapaxes(1, 2) for part in ("q", "k", "v")
    )
    if f"{name}.q_norm.weight" in p:
        q, k = _norm(s, p[f"{name}.q_norm.weight"], q), _norm(s, p[f"{name}.k_norm.weight"], k)
    repeats = s["num_attention_heads"] // s["num_key_value_heads"]
    q, k, v = _rotated(s, q), np.repeat(_rotated(s, k), repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    return _linear(p, f"{name}.o_proj", mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1))


def _rotated(s: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Each pair (i, i + d/2) as a complex number, turned."""
    half = s["head_dim"] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    turned = pairs * np.exp(1j * np.arange(x.shape[2])[:, None] * _speeds(s, half))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _speeds(s: dict[str, Any], half: int) -> np.ndarray:
    scaling = s.get("rope_scaling") or {}
    found = []
    for i in range(half):
        speed = s["rope_theta"] ** (-i / half)
        if scaling.get("type") == "linear":
            speed /= scaling["factor"]
        elif scaling.get("rope_type") == "llama3":
            wave, trained = 2 * np.pi / speed, scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (trained / wave - low) / (high - low)
            if wave > trained / low:
                speed /= scaling["factor"]
            elif wave >= trained / high:
                speed = (1 - smooth) * speed / scaling["factor"] + smooth * speed
        found.append(speed)
    return np.array(found)
