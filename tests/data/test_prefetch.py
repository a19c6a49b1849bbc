"""Reading ahead in a thread: order, errors, and the end of the thread."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bilevel.data import ArrayDataset, Loader, Prefetcher, read_ahead
from bilevel.types import UserError


class Failing(Loader):
    """Counts the batches it has read, and fails at step 5."""

    read = 0

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step == 5:
            raise OSError("the disk is gone")
        self.read += 1
        return super().batch(step)


def prefetch(loader: Loader, start: int, stop: int, depth: int = 2) -> Prefetcher[dict[str, Any]]:
    return read_ahead(((step, loader.batch(step)) for step in range(start, stop)), depth)


@pytest.fixture
def loader() -> Failing:
    return Failing(ArrayDataset({"x": np.arange(100)}), 10, seed=0)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert eventually(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_batches_in_order(loader: Failing, depth: int):
    for start, stop in ((0, 5), (6, 30), (7, 7)):
        pairs = list(prefetch(loader, start, stop, depth))
        assert [step for step, _ in pairs] == list(range(start, stop))
        for step, batch in pairs:
            np.testing.assert_array_equal(batch["id"], loader.indices(step))


def test_reads_ahead_but_not_further_than_the_depth(loader: Failing):
    with prefetch(loader, 6, 1000, depth=3) as batches:
        next(batches)
        assert eventually(lambda: loader.read >= 4)
        time.sleep(0.05)
        assert loader.read <= 5  # one used, three ready, one waiting for its place


def test_error_comes_in_the_place_of_its_batch(loader: Failing):
    batches = prefetch(loader, 3, 10)
    assert [next(batches)[0], next(batches)[0]] == [3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(batches) == []


def test_close_ends_the_thread_and_the_iteration(loader: Failing):
    batches = prefetch(loader, 6, 10**9)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_leaving_the_context_ends_the_thread(loader: Failing):
    with prefetch(loader, 6, 10**9) as batches:
        next(batches)
    assert list(batches) == []


def test_a_forgotten_iterator_ends_its_thread(loader: Failing):
    batches = prefetch(loader, 6, 10**9)
    next(batches)
    del batches
    gc.collect()


def test_closing_from_another_thread_ends_a_waiting_consumer():
    entered, release = threading.Event(), threading.Event()

    class Stuck(Loader):
        def batch(self, step: int) -> dict[str, np.ndarray]:
            entered.set()
            release.wait(5)
            return super().batch(step)

    batches = prefetch(Stuck(ArrayDataset({"x": np.arange(4)}), 2, seed=0), 0, 10)
    entered.wait(5)
    closer = threading.Thread(target=batches.close)
    closer.start()
    assert list(batches) == []
    release.set()
    closer.join()


def test_bad_depth(loader: Failing):
    with pytest.raises(UserError, match="prefetch depth is 0; it must be at least 1"):
        prefetch(loader, 0, 1, depth=0)
