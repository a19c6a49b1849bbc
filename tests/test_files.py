"""Parameter trees in safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bilevel.files import load_metadata, load_tree, save_tree
from bilevel.types import UserError


class Pair(NamedTuple):
    one: Any
    two: Any


TREE = {
    "block_1": {"mlp": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "bias": jnp.zeros(3)}},
    "head": Pair(np.arange(6).reshape(2, 3).T, [np.asarray(True), jnp.zeros((0, 4))]),
}
NAMES = ["block_1/mlp/bias", "block_1/mlp/kernel", "head/one", "head/two/0", "head/two/1"]


def same(found: Any, wanted: Any) -> None:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def test_a_tree_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tree(path, TREE, {"kind": "é"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, {**TREE, "head": None}))
    for template in (TREE, {**TREE, "block_1": shapes["block_1"]}):
        found, metadata = load_tree(path, template)
        assert metadata == load_metadata(path) == {"kind": "é"}
        jax.tree.map(same, found, TREE)
        assert isinstance(found["block_1"]["mlp"]["kernel"], jax.Array)
        assert isinstance(found["head"].one, np.ndarray)
    nested, _ = load_tree(path)
    same(nested["block_1"]["mlp"]["kernel"], TREE["block_1"]["mlp"]["kernel"])
    same(nested["head"]["two"]["0"], True)


def test_other_readers_open_it(tmp_path: Path) -> None:
    save_tree(tmp_path / "a.safetensors", TREE)
    found = load_file(tmp_path / "a.safetensors")
    assert sorted(found) == NAMES
    for name, leaf in zip(NAMES, jax.tree.leaves(TREE), strict=True):
        same(found[name], leaf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tree: tree["a"].update(x=np.zeros(3, np.float32)),
            r"its parameter a/x is float32\[2\], and float32\[3\]",
        ),
        (
            lambda tree: tree["a"].update(x=jnp.zeros(2, jnp.bfloat16)),
            r"a/x is float32\[2\], and bfloat16\[2\] is needed",
        ),
        (lambda tree: tree.update(c=np.zeros(1)), r"its parameter c is missing, and float64\[1\] is needed"),
        (lambda tree: tree.pop("b"), r"its parameter b is int32\[\], and none is needed"),
    ],
)
def test_the_first_difference_is_named(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    path, template = tmp_path / "a.safetensors", {"a": {"x": np.zeros(2, np.float32)}, "b": np.int32(1)}
    save_tree(path, template)
    change(template)
    with pytest.raises(UserError, match=words):
        load_tree(path, template)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="does not exist; check the path"):
        load_tree(path)
    save_tree(path, TREE)
    whole = path.read_bytes()
    for content in (b"", b"PK no such file, but a long text", whole[:-1], whole[:20], whole + b"more"):
        path.write_bytes(content)
        for read in (load_tree, load_metadata):
            with pytest.raises(UserError, match=f"^{path} cannot be read as a safetensors file .*; write it again.$"):
                read(path)
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_tree(tmp_path)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tree(path, {"x": np.zeros(1)})
    for tree, words in (({"x": np.asarray("text")}, "Cannot write .*str"), ({"a/b": 1, "a": {"b": 2}}, "called a/b")):
        with pytest.raises(UserError, match=words):
            save_tree(path, tree)
    with pytest.raises(UserError, match="Cannot write"):
        save_tree(tmp_path / "none" / "a.safetensors", {"x": np.zeros(1)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    same(load_tree(path)[0]["x"], np.zeros(1))
