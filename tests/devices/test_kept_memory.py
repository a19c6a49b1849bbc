"""Memory that is kept from one call of a program to the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from study_calls import environment

from bilevel.devices import environment as process

CALLS = """
import resource, sys
import jax, jax.numpy as jnp
from bilevel.devices.environment import keep_memory

print(keep_memory() if sys.argv[1] == "kept" else False)

step = jax.jit(lambda x: x @ jnp.ones((128, 128)))  # 64 MB, freed after each call
x = jnp.ones((1 << 17, 128))
counts = []
for _ in range(32):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[16])
"""


def faults(how: str) -> tuple[bool, int]:
    """Whether it was done, and the median of the page faults in 32 calls of a program afterwards."""
    own = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {name: value for name, value in environment().items() if not name.startswith(own)}
    run = subprocess.run([sys.executable, "-c", CALLS, how], env=clean, capture_output=True, text=True, check=True)
    done, count = run.stdout.split()
    return done == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns memory at each step")
def test_a_program_finds_the_memory_of_its_last_call() -> None:
    (done, kept), (_, given_back) = faults("kept"), faults("given back")
    assert done
    assert given_back > 8000  # pages of 4 KiB
    # A call may begin before the memory of the last one is freed: the heap then grows by as much, a few times in 32 calls.
    assert kept < 100


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_sets_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not process.keep_memory()


def test_nothing_is_done_where_an_accelerator_may_be_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(process, "_SETTINGS", {})
    cases = (("cpu", ["cuda"], True), (None, [], True), (None, ["cuda"], False), ("cuda,cpu", [], False))
    for platforms, plugins, done in cases:
        monkeypatch.setattr(process, "entry_points", lambda *, group, plugins=plugins: plugins)
        monkeypatch.setattr(process, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms)))
        assert process.keep_memory() is (done and platform.libc_ver()[0] == "glibc"), (platforms, plugins)
