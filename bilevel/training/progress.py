"""What the user sees while a run trains."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A tqdm bar on a terminal, else a line on stderr every ten seconds.

    A context manager.

    Args:
        start: steps done before.
        stop: steps at the end.
        enabled: False shows nothing.
    """

    def __init__(self, start: int, stop: int, enabled: bool = True):
        self._stop = stop
        self._enabled = enabled
        self._bar = _bar(start, stop) if enabled and sys.stderr.isatty() else None
        self._shown_at = -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the losses among `values`."""
        if not self._enabled:
            return
        losses = {name: f"{value:.4g}" for name, value in values.items() if name.endswith("loss")}
        losses = {name: text for name, text in losses.items() if text != "nan"}
        if self._bar is not None:
            self._bar.set_postfix(losses)
        elif step >= self._stop or time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            text = "  ".join(f"{name} {value}" for name, value in losses.items())
            with contextlib.suppress(OSError):  # nobody reads any more: no reason to stop training
                print(f"step {step}/{self._stop}  {text}", file=sys.stderr, flush=True)


def _bar(start: int, stop: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=start, total=stop, unit="step", dynamic_ncols=True)
