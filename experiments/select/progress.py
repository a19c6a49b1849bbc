"""What the user sees while documents are scored and written."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Documents done and rows per second: on one line of a terminal, else a line on stderr every ten seconds.

    Args:
      enabled: False shows nothing.
    """

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._what = ""
        self._documents = self._rows = 0
        self._began = self._shown = time.monotonic()

    def begin(self, what: str) -> None:
        """Starts to count for the next file."""
        self._what, self._documents, self._rows = what, 0, 0
        self._began = time.monotonic()

    def add(self, documents: int, rows: int = 0) -> None:
        """Counts documents, and the rows they were cut into."""
        self._documents += documents
        self._rows += rows
        now = time.monotonic()
        if self._enabled and now - self._shown > (0.2 if self._terminal else _SECONDS_BETWEEN_LINES):
            self._shown = now
            self._show("")

    def end(self) -> None:
        """Shows the final count of a file."""
        if self._enabled:
            self._show("\n")

    def _show(self, end: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = f", {self._rows / seconds:,.0f} rows/s" if self._rows else ""
        text = f"{self._what}: {self._documents:,} documents{speed}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
