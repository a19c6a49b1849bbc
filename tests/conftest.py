"""Eight virtual CPU devices for every test; types and ranks must match where the library's own code runs."""

import os
from pathlib import Path

import jax
import pytest

from bilevel.study.environment import keep_programs

KEPT = {"persistent_cache_min_compile_time_secs": 0.1, "compilation_cache_max_size": 4 << 30}
"""With a largest size jax locks the folder, so that no worker reads a program that another one is still writing."""

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time of the tests is compilation: leave out what only makes programs faster.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()


@pytest.fixture(autouse=True, scope="session")
def compiled_programs() -> None:
    """Share the compiled programs among all workers and with later runs, by processor and version of jax.

    A folder in JAX_COMPILATION_CACHE_DIR has precedence; "" keeps nothing.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    keep_programs(cache / "bilevel" / "tests" / f"jax-{jax.__version__}")
    if folder := jax.config.jax_compilation_cache_dir:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for processes that tests start
    for name, value in KEPT.items():
        os.environ[f"JAX_{name.upper()}"] = str(value)
        jax.config.update(f"jax_{name}", value)
