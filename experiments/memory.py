"""Memory that the process keeps from one step to the next."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from importlib.metadata import entry_points

import jax

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
