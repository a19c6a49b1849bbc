"""The progress that users see."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from bilevel.training import progress
from bilevel.training.progress import Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_of_a_known_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, start=2) as shown:
        shown.advance(2)
        shown.show({"loss": 1.23456, "rate": float("nan")})
        clock.now += 9
        shown.advance(2)
        shown.show({"loss": 2.0})
        clock.now += 2
        shown.advance(1)
        shown.advance(3)
        shown.show({"loss": 3.0})
    lines = ["step 4/10  loss 1.235", "step 7/10  loss 2", "step 10/10  loss 3"]
    assert capsys.readouterr().err.splitlines() == lines


def test_lines_of_an_unknown_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, True, "scoring a.txt", unit="document") as shown:
        shown.advance(1000)
        clock.now += 11
        shown.advance(1000)
        shown.advance(234)
    assert capsys.readouterr().err.splitlines() == ["scoring a.txt: 2,000 documents", "scoring a.txt: 2,234 documents"]


def test_nothing_is_shown_on_request(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, False) as shown:
        clock.now += 11
        shown.advance(3)
        shown.show({"loss": 1.0})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("installed", [True, False])
def test_a_terminal(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the numbers; lines where tqdm is not installed."""
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal: Any = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(20, description="training") as shown:
        shown.advance(20)
        shown.show({"loss": 0.5})
    assert ("20/20 [" in terminal.getvalue()) == installed
    assert ("loss=0.5" if installed else "training: step 20/20  loss 0.5\n") in terminal.getvalue()
