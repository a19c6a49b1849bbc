"""Compiled programs are kept between runs, so that a second seed, or a continued run, does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

SECONDS = 0.5
"""Programs that compile faster are not kept."""


def keep_programs(folder: Path = Path("~/.cache/bilevel/programs")) -> None:
    """Turns jax's persistent compilation cache on, unless the user has chosen (JAX_COMPILATION_CACHE_DIR, "" for none).

    Each kind of processor has a folder of its own: programs for one may not run on another that shares the home directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    own = folder.expanduser() / hashlib.sha256(_processor().encode()).hexdigest()[:16]
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written costs time, not results
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
