"""Sentences on stderr about what was given and is not used."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

_SHOWN = 5


@functools.cache
def note(text: str) -> None:
    """Print a sentence on stderr; once a process, for data are opened several times."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def some(names: Sequence[str]) -> str:
    """Join the first few names with commas."""
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
