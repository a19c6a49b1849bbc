"""Saving and restoring states."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.training import Checkpoints
from bilevel.types import UserError


def example_state(value: float = 1.0) -> dict[str, Any]:
    params = {"a/b": jnp.full((3, 2), value, jnp.float32), "half": jnp.full((2,), value, jnp.bfloat16)}
    key = jax.random.key(7, impl="rbg")
    return {
        "step": jnp.asarray(3, jnp.int32),
        "params": params,
        "opt": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "none": None,
        "nothing": {},
        "no_rows": jnp.zeros((0, 4)),
        "key": key,
        "keys": jax.random.split(jax.random.key(1), 3),
        "numpy": np.arange(4),
        "int": 5,
        "float": 2.5,
        "bool": True,
        "placed": jax.device_put(jnp.ones(3), jax.devices()[0]),
    }


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array):
            assert (a.dtype, a.shape, a.committed) == (b.dtype, b.shape, b.committed)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_of_all_kinds_of_leaves(tmp_path: Path):
    with Checkpoints(tmp_path / "new" / "dir") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(example_state()) is None
        checkpoints.save(4, example_state(2.0))
    with Checkpoints(tmp_path / "new" / "dir") as checkpoints:
        restored = checkpoints.restore_latest(example_state(0.0))
        assert restored is not None
        assert restored[0] == 4
        assert_same(restored[1], example_state(2.0))


def test_abstract_template(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        state = {name: example_state(2.0)[name] for name in ("step", "params", "opt", "keys", "no_rows")}
        checkpoints.save(4, state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(jax.eval_shape(lambda: state))
        assert restored is not None
        assert_same(restored[1], state)


def test_the_saved_state_may_be_donated(tmp_path: Path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"a": jnp.zeros((1000, 1000)), "b": jnp.zeros(())}
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 4):
            state = step(state)
            checkpoints.save(number, state)
            for _ in range(5):
                state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(state)
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["a"], np.full((1000, 1000), 13.0))  # 2 · 6 + 1


def test_numpy_leaves_may_be_changed_after_saving(tmp_path: Path):
    array = np.zeros(100_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": array})
        array[:] = 1
        checkpoints.wait()
        restored = checkpoints.restore_latest({"a": array})
    assert restored is not None
    assert not restored[1]["a"].any()


def test_keeps_the_newest(tmp_path: Path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 9):
            checkpoints.save(step, {"a": jnp.asarray(step)})
        checkpoints.save(9, {"a": jnp.asarray(0)}, wait=True)  # already there
        restored = checkpoints.restore_latest({"a": jnp.asarray(0)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    assert restored is not None
    assert int(restored[1]["a"]) == 9


DAMAGE = {
    "everything": lambda path: (shutil.rmtree(path), path.mkdir()),
    "the item": lambda path: shutil.rmtree(path / "state"),
    "the description": lambda path: (path / "state" / "_METADATA").unlink(),
    "the manifest": lambda path: (path / "state" / "manifest.ocdbt").unlink(),
    "the values": lambda path: shutil.rmtree(path / "state" / "d"),
    "half of the values": lambda path: [
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) for file in (path / "state" / "d").iterdir()
    ],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, example_state(10.0))
        checkpoints.save(20, example_state(20.0))
    DAMAGE[what](tmp_path / "20")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(example_state())
        assert restored is not None
        assert restored[0] == 10
        assert_same(restored[1], example_state(10.0))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"warning: the checkpoint of step 20 in {tmp_path} is damaged")
        checkpoints.save(20, example_state(21.0))  # the step can be saved again
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(example_state())
        assert restored is not None
        assert_same(restored[1], example_state(21.0))
    assert (tmp_path / "20.damaged").exists()


def test_no_readable_checkpoint(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, example_state())
    DAMAGE["the values"](tmp_path / "10")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"None of the checkpoints .* delete it to start from the beginning"),
    ):
        checkpoints.restore_latest(example_state())
    assert (tmp_path / "10").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placed": jnp.ones(4)}, r"`state\['placed'\]` is float32\[3\] there and float32\[4\] here"),
        (
            {"numpy": np.arange(4, dtype=np.int8)},
            r"`state\['numpy'\]` is int64\[4\] there and int8\[4\] here",
        ),
        ({"extra": 1}, r"`state\['extra'\]` is missing there and int64\[\] here"),
        ({"key": None}, r"`state\['key'\]` is uint32\[4\] there and missing here"),
    ],
)
def test_template_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, example_state(), wait=True)
        with pytest.raises(UserError, match=message):
            checkpoints.restore_latest(example_state() | change)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_read_only_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = {"a": jnp.arange(3.0)}
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(state) is None
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, wait=True)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # another process is writing it
    before = sorted(path.name for path in tmp_path.iterdir())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(state)
        checkpoints.save(4, state, wait=True)
    assert restored is not None
    assert restored[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "step 2 in" in (warning := capsys.readouterr().err)
    assert "renamed" not in warning


def test_unwritable_directory(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write checkpoints in"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_failing_save_is_a_user_error(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        checkpoints.save(1, {"a": jnp.ones(3)}, wait=True)
    checkpoints.close()


def test_orbax_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, example_state(), wait=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore_latest(example_state())
    assert capfd.readouterr() == ("", "")


def test_full_disk_is_a_user_error_and_loses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    state = {str(i): jax.random.normal(jax.random.key(i), (300, 300)) for i in range(20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # larger files cannot be written
        try:
            with pytest.raises(UserError, match=r"could not be written to .*check the free space"):
                checkpoints.save(2, state, wait=True)
            time.sleep(0.5)  # the writes of the other arrays end, which nobody waits for
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr() == ("", "")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(state)
        assert restored is not None
        assert restored[0] == 1
        checkpoints.save(2, state)
