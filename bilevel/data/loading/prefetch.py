"""Reads batches ahead of their use."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Generic, Self, TypeVar

from bilevel.types import UserError

T = TypeVar("T")

_PATIENCE = 0.1  # seconds between two looks at whether to stop


class Prefetcher(Generic[T]):
    """An iterator over `(step, batch)` that a daemon thread reads ahead.

    Made by `read_ahead`.

    It is also a context manager. Closing it, or dropping the last reference to it, ends the thread.
    """

    def __init__(self, pairs: Iterable[tuple[int, T]], depth: int):
        self._queue: queue.Queue[Any] = queue.Queue(depth)  # pairs; at the end None, or what was raised
        self._stop = threading.Event()
        # The thread must not refer to self, or self would never be collected.
        self._thread = threading.Thread(
            target=_produce, args=(pairs, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, T]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
            if isinstance(item, tuple):
                return item
            self.close()
            if item is not None:
                raise item
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it; further calls do nothing."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_ahead(pairs: Iterable[tuple[int, T]], depth: int = 2) -> Prefetcher[T]:
    """Draw pairs `(step, anything)` ahead in a daemon thread.

    Args:
        pairs: what is read ahead.
        depth: how many pairs to keep ready.

    Returns:
        An iterator over the pairs. What the thread raises is raised at the place of the pair that failed.

    Raises:
        UserError: `depth` is not positive.
    """
    if depth < 1:
        raise UserError(f"The prefetch depth is {depth}; it must be at least 1.")
    return Prefetcher(pairs, depth)


def _produce(pairs: Iterable[tuple[int, Any]], out: queue.Queue[Any], stopping: threading.Event) -> None:
    try:
        for pair in pairs:
            if not _put(pair, out, stopping):
                return
        _put(None, out, stopping)
    except BaseException as error:
        _put(error, out, stopping)


def _put(item: Any, out: queue.Queue[Any], stopping: threading.Event) -> bool:
    while not stopping.is_set():
        try:
            out.put(item, timeout=_PATIENCE)
        except queue.Full:
            continue
        return True
    return False
