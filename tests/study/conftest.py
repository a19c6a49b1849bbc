"""What tests of the study layer share."""

from collections.abc import Iterator

import jax
import pytest

from bilevel.devices import sharding
from bilevel.study import comparison, set_tables


@pytest.fixture(autouse=True, scope="package")
def keep_small_programs() -> Iterator[None]:
    """Programs of the linear task compile within the 0.2 seconds from which others are kept, and there are many of them."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take the first of the devices alone."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None: mesh)


@pytest.fixture
def with_pictures() -> None:
    """Reports and plots are drawn: several seconds."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and plots, most of the time of a small comparison, are tested by themselves."""
    if "with_pictures" not in request.fixturenames:
        report = lambda setting, *given: (setting.config.study.run_dir / "report.html").write_text("report")  # noqa: E731
        monkeypatch.setattr(comparison, "_report", report)
        monkeypatch.setattr(set_tables, "_plot", lambda *given: None)
