"""What tests of several experiments share."""

import jax
import pytest

from bilevel.devices import sharding


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments run on the first of the devices alone."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
