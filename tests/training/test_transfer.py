"""Sequences and samplers in files: what is written is read, and only with the data that it belongs to."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bilevel import samplers
from bilevel.data import ArrayDataset
from bilevel.files import save_tree
from bilevel.training import load_sampler, load_sequence, save_sampler, save_sequence
from bilevel.types import UserError

DATA = ArrayDataset({"x": np.arange(6.0)})
OTHER = ArrayDataset({"x": np.arange(6.0) + 1})
SEQUENCE = np.asarray([[0, 5], [2, 2], [1, 3]])
OWN: Any = {"content_hash": DATA.content_hash, "num_rows": 6}


def sampler(rows: int = 6) -> samplers.Sampler:
    return samplers.rl_sampler(rows, 2, 3, summary_size=2, logger_size=3, policy_size=2)


def template(rows: int = 6) -> Any:
    return jax.eval_shape(sampler(rows).init, jax.random.key(0)).params


def test_sequences_and_samplers_come_back(tmp_path: Path) -> None:
    save_sequence(tmp_path / "s.safetensors", SEQUENCE, **OWN)
    found = load_sequence(
        tmp_path / "s.safetensors", content_hash=ArrayDataset({"x": np.arange(6.0)}).content_hash, num_rows=6
    )
    np.testing.assert_array_equal(found, SEQUENCE)
    assert found.dtype == np.int32
    params = sampler().init(jax.random.key(1)).params
    save_sampler(tmp_path / "p.safetensors", params, **OWN)
    again = load_sampler(tmp_path / "p.safetensors", template(), **OWN)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sampler().init(jax.random.key(0), again).params.policy.decoder.kernel.shape == (2, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors", "s.safetensors"]


def test_mistakes(tmp_path: Path) -> None:
    file, content_hash = tmp_path / "s.safetensors", DATA.content_hash
    with pytest.raises(UserError, match="does not exist"):
        load_sequence(file, **OWN)
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        save_sequence(file, np.arange(3), **OWN)
    with pytest.raises(UserError, match="Cannot write"):
        save_sequence(tmp_path / "no" / "s.safetensors", SEQUENCE, **OWN)
    save_sequence(file, SEQUENCE, **OWN)
    with pytest.raises(UserError, match=f"content hash {content_hash}, and the data at hand have {OTHER.content_hash}"):
        load_sequence(file, content_hash=OTHER.content_hash, num_rows=6)
    np.testing.assert_array_equal(load_sequence(file, content_hash=None, num_rows=6), SEQUENCE)
    with pytest.raises(UserError, match="data with 6 rows, and the data at hand have 7"):
        load_sequence(file, content_hash=None, num_rows=7)
    with pytest.raises(UserError, match="holds a sequence of row numbers, not a learned sampler"):
        load_sampler(file, template(), **OWN)
    save_sampler(file, sampler().init(jax.random.key(1)).params, **OWN)
    with pytest.raises(
        UserError, match=r"its parameter policy/decoder/kernel is float32\[2, 6\], and float32\[2, 7\] is needed"
    ):
        load_sampler(file, template(7), **OWN)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    file.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_sequence(file, content_hash="0", num_rows=6)
    save_tree(file, {"sequence": SEQUENCE})
    with pytest.raises(UserError, match="holds other arrays, not a sequence of row numbers; give another file"):
        load_sequence(file, content_hash="0", num_rows=6)
