"""What the user sees while something long runs."""

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

        with Progress(len(files), description="scoring") as progress:
            for file in files:
                ...
                progress.advance()

    Args:
        total: units at the end; None: not known.
        enabled: False shows nothing.
        description: what is done, shown in front.
        start: units done before.
        unit: what is counted, in the singular.
    """

    def __init__(
        self, total: int | None, enabled: bool = True, description: str = "", *, start: int = 0, unit: str = "step"
    ):
        self._total, self._done, self._unit = total, start, unit
        self._enabled = enabled
        self._description = description
        self._values: dict[str, str] = {}
        self._began = time.monotonic()
        self._shown_at, self._shown = -math.inf, start
        self._bar = self._new_bar() if enabled and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done != self._shown:
            self._print_line()

    def advance(self, count: int = 1) -> None:
        """Count units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - max(self._began, self._shown_at) > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def show(self, values: Mapping[str, float]) -> None:
        """Show numbers, those that are not NaN, beside the count."""
        self._values = {name: f"{value:.4g}" for name, value in values.items() if not math.isnan(value)}
        if self._bar is not None:
            self._bar.set_postfix(self._values)
        elif self._done == self._total or time.monotonic() - self._shown_at > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self._shown_at, self._shown = time.monotonic(), self._done
        if not self._enabled:
            return
        count = f"{self._done:,} {self._unit}s" if self._total is None else f"{self._unit} {self._done}/{self._total}"
        parts = [f"{self._description}: {count}" if self._description else count]
        parts += [f"{name} {value}" for name, value in self._values.items()]
        with contextlib.suppress(OSError):  # nobody reads any more: no reason to stop
            print("  ".join(parts), file=sys.stderr, flush=True)

    def _new_bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(
            desc=self._description or None, initial=self._done, total=self._total, unit=self._unit, dynamic_ncols=True
        )
