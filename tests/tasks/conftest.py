"""What tests of several tasks share."""

import jax
import pytest
from tiny_text import shrink

from bilevel.devices import sharding


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons run on the first of the devices alone."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *devices: mesh)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network "xs" of text has one block."""
    shrink(monkeypatch)
