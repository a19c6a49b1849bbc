"""Commands in the environments of containers and clusters: a run, or one sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bilevel import cli
from bilevel.data import open_source, pack
from bilevel.devices import environment, sharding
from bilevel.files import user_path
from bilevel.types import UserError

HELP = [sys.executable, "-m", "bilevel.cli", "--help"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_output_cannot_show_is_a_question_mark(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert b"bilevel COMMAND ?\n" in written.getvalue()


def test_nobody_reads_the_output() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(HELP, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_the_output_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode in (1, 2), "where it is noticed depends on its buffer"
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == done.stderr.count(b"No space left on device") == 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id of which the system knows nothing."""
    monkeypatch.delenv("HOME")

    def nobody(_: object) -> object:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)


@pytest.mark.usefixtures("homeless")
def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(environment, "jax", SimpleNamespace(config=SimpleNamespace()))
    environment.keep_programs()
    (tmp_path / "a.txt").write_text("some text")
    source = open_source(str(tmp_path / "a.txt"))
    with pytest.raises(
        UserError, match=r"There is no home folder for ~/\.cache/bilevel: set HOME, or .*--data\.cache-dir"
    ):
        pack(source, length=8, cache_dir="~/.cache/bilevel")
    assert len(pack(source, length=8, cache_dir=tmp_path / "cache")) == 1
    assert user_path("a/~") == Path("a/~")


@pytest.fixture
def program_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that jax keeps every compiled program in."""
    chosen = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in chosen}
    for values in (chosen, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is chosen:
            yield tmp_path


def test_programs_of_several_cpu_devices_are_not_kept(program_folder: Path) -> None:
    kept = []
    for devices in (1, 2):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        environment.compile_anew(mesh)
        x = jax.device_put(np.arange(8.0), sharding.row_sharding(mesh))
        jax.block_until_ready(jax.jit(jnp.sum)(x))
        kept.append(len(list(program_folder.iterdir())))
    assert 0 < kept[0] == kept[1]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(name).write_text("some text")
    packed = pack(open_source(name), length=8, cache_dir=tmp_path / "cache")
    assert pack(open_source(name), length=8, cache_dir=tmp_path / "cache").name == packed.name == name
