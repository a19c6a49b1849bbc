"""Time spent on training."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the seconds between `start` and `stop`.

    Args:
        seconds: where it begins (the seconds of the run before it was continued).
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Start counting, unless it already counts."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> float:
        """Stop counting and return all seconds counted so far."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
        return self.seconds
