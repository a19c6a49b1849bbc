"""Finished runs with random weighting networks, which tell texts apart better than those of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.files import save_tree
from bilevel.nn.weighting import NGramWeighting
from bilevel.training import prepare_run_dir


def random_run(path: Path, *, length: int = 24, width: int = 4, **data: Any) -> Path:
    """A run of soba on text in rows of `length` bytes, with more settings of its data."""
    settings = {"data": {"length": length, **data}, "model": {"weighting_width": width}}
    prepare_run_dir(path, {"task": "language_modeling", "method": "soba", "seed": 0, **settings})
    module = NGramWeighting(width=width, hidden=width)
    rows = jnp.zeros((1, length), jnp.uint8), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *rows)["params"]
    rng = np.random.default_rng(0)
    save_tree(path / "weights.safetensors", jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), shapes))
    return path
