"""Whether data lie on the device or travel to it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from bilevel.data import ArrayDataset, Loader
from bilevel.devices import sharding
from bilevel.training import Data, Replay, Resident, Sampled
from bilevel.training.opening import Residence, open_source, steps_in_call
from bilevel.training.resident import fits_on_device
from bilevel.types import UserError

ROWS, BYTES = 64, 12  # 8 of x, 4 of id


class Device:
    """A device that says how much memory it has, or nothing."""

    def __init__(self, limit: int | None):
        self._stats = None if limit is None else {"bytes_limit": limit}

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


def toy_loaders() -> list[Loader]:
    return [Loader(ArrayDataset({"x": np.ones((ROWS, 2), np.float32)}, name="toy"), 8, seed=0) for _ in range(2)]


def opened(residence: Residence = "auto", loaders: Sequence[Loader] = ()) -> Data | Resident:
    generic, specific = loaders or toy_loaders()
    return open_source(residence, generic, specific, sharding.make_mesh(jax.devices()[:1]))


def test_data_lie_on_the_device_unless_told_otherwise() -> None:
    assert isinstance(opened(), Resident)
    assert isinstance(opened("always"), Resident)
    assert isinstance(opened("never"), Data)


def test_only_batches_that_travel_take_a_call_each() -> None:
    streamed, held = opened("never"), opened("always")
    rows = toy_loaders()[0].dataset
    assert isinstance(streamed, Data)
    replayed = Replay(streamed, lambda step: {})
    assert [steps_in_call(source, 8) for source in (streamed, replayed, held, Sampled(rows, rows))] == [1, 1, 8, 8]


def test_what_does_not_fit_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    both = 2 * ROWS * BYTES
    loaders = toy_loaders()
    for limit, found in ((8 * both, Resident), (8 * both - 8, Data)):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "local_devices", lambda *_, limit=limit: [Device(limit)])
            assert isinstance(opened(loaders=loaders), found), limit
            assert isinstance(opened("always", loaders), Resident)
            assert isinstance(opened(loaders=[loaders[0]] * 2), Resident)  # one data set counts once


def test_devices_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(ArrayDataset):
        def __len__(self) -> int:
            return (1 << 30) // BYTES // 2

    huge = Loader(Large({"x": np.ones((ROWS, 2), np.float32)}, name="large"), 8, seed=0)
    for devices, fits in ((1, True), (2, True), (3, False)):
        monkeypatch.setattr(jax, "local_devices", lambda *_, devices=devices: [Device(None)] * devices)
        assert fits_on_device(huge, huge) is fits


def test_data_of_several_processes_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert isinstance(opened(), Data)
    with pytest.raises(UserError, match="Resident data are for one process, and this run has 2"):
        opened("always")
