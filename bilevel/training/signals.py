"""SIGTERM and SIGINT as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_NOTE = b"\nstopping after the current step (interrupt again to stop at once)\n"
STOPPED = 3
"""Exit code of a program that a signal stopped after saving."""


class Stopped(Exception):
    """A signal stopped a run after saving."""


class StopSignals:
    """While open, SIGTERM and SIGINT only set `requested`.

    A second SIGINT raises KeyboardInterrupt.

    A context manager; the previous handlers come back at the end. Does nothing outside the main thread, where
    Python does not allow handlers.

    Args:
        enabled: False leaves the signals alone.
    """

    def __init__(self, enabled: bool = True):
        self.requested = False
        self._enabled = enabled
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def agreed(self) -> bool:
        """Return whether any process was asked to stop.

        Every process must call this at the same step.
        """
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.requested))))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # `print` is not safe here: the handler may interrupt another print. Where Ctrl-C ended the program that reads this
        # process's output too (`… | tee log`), nobody can be told, but the run must still be saved.
        with contextlib.suppress(OSError):
            os.write(2, _NOTE)
