"""Eight virtual CPU devices for every test; types and ranks must match where the library's own code runs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bilevel.devices.environment import keep_programs

KEPT_SECONDS = 0.1
"""Programs that compile faster are not kept. No largest size is set: jax's bookkeeping for it does not survive a kill."""

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time of the tests is compilation: omit what only makes programs faster. Without the emitters a program of many
# small operations compiles in a third of the time, and in one piece instead of 32 in five sixths of it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Traces are many small objects that live on: collected as often as Python does by default, they cost a tenth of the time.
gc.set_threshold(100_000, 20, 50)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()


@pytest.fixture(autouse=True, scope="session")
def compiled_programs() -> None:
    """Share the compiled programs among all workers and with later runs, by processor and version of jax.

    A folder in JAX_COMPILATION_CACHE_DIR has precedence; "" keeps nothing.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    keep_programs(cache / "bilevel" / "tests" / f"jax-{jax.__version__}")
    if folder := getattr(jax.config, "jax_compilation_cache_dir", None):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for processes that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(KEPT_SECONDS)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_SECONDS)


@pytest.fixture(autouse=True)
def programs_kept_again() -> Iterator[None]:
    """Undo `compile_anew` after a test of several devices."""
    name = "jax_enable_compilation_cache"
    kept = getattr(jax.config, name)
    yield
    if getattr(jax.config, name) != kept:
        jax.config.update(name, kept)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def what_lives_on() -> Iterator[None]:
    """Leave what a module's tests traced out of later collections: reading a checkpoint makes one, of everything."""
    yield
    gc.collect()
    gc.freeze()
