"""Eight virtual CPU devices for every test; types and ranks must match where the library's own code runs."""

import os
import tempfile
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Most of the time of the tests is compilation: leave out what only makes programs faster.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()


@pytest.fixture(autouse=True, scope="session")
def compiled_programs() -> Iterator[None]:
    """Programs that the experiments compile are kept for this session only, and not in the user's home."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for processes that tests start
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield
