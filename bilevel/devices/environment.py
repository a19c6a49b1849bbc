"""What a process keeps: compiled programs between runs, and freed memory between steps."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import sys
from importlib.metadata import entry_points
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

SECONDS = 0.5
"""Programs that compile faster are not kept."""


def keep_programs(folder: Path = Path("~/.cache/bilevel/programs")) -> None:
    """Turns jax's persistent compilation cache on, unless the user has chosen (JAX_COMPILATION_CACHE_DIR, "" for none).

    Each kind of processor has a folder of its own: programs for one may not run on another that shares the home directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    try:
        own = folder.expanduser() / hashlib.sha256(_processor().encode()).hexdigest()[:16]
        own.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # no home, or one that cannot be written, costs time, not results
    if not os.access(own, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def compile_anew(mesh: Mesh) -> None:
    """Turns jax's persistent compilation cache off where programs span several CPU devices.

    XLA orders the collectives of a program that it compiles. One that it loads (jax 0.10.2) has lost that order: devices begin
    with different ones, and wait for each other until the process is aborted.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax asks once


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


# Of malloc.h (glibc).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SETTINGS = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}


def keep_memory() -> bool:
    """Makes the C library keep freed memory for what is allocated next, where programs run on CPU.

    XLA allocates the temporary memory of a program for each call. On CPU the C library returns it to the kernel at the end
    of each step and gets it anew, page by page, each filled with zeros: a fifth of the time of a training step of size S. Only
    glibc is known to need this. Environment variables that set its allocator (`MALLOC_…`, `GLIBC_TUNABLES`) have the last word.
    Where an accelerator may be in use nothing is done: it has an allocator of its own.

    Returns:
        Whether that was done.
    """
    if (
        sys.platform != "linux"
        or not _only_cpu()
        or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
    return mallopt is not None and all(mallopt(name, value) for name, value in _SETTINGS.items())


def _only_cpu() -> bool:
    """Whether jax will run on CPU, as far as one can tell before it starts (hosts join each other before that)."""
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms:
        return platforms == "cpu"
    return not entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None
