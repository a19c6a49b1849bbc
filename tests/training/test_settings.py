"""Settings as dataclasses: bounds, files, and what decides the outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bilevel.training.settings import Count, Share, check_bounds, filled, free, may_change, of_comparison, of_run, plain
from bilevel.types import UserError


@dataclass(frozen=True)
class Inner:
    share: Share = 0.5
    folder: Path = free(Path("here"))


@dataclass(frozen=True)
class Outer:
    steps: Count = 10
    seeds: Count = of_comparison(1)
    log_every: Count = free(5)
    inner: Inner = field(default_factory=Inner)


def test_values_of_a_file_fill_nested_fields_in_their_own_types() -> None:
    found = filled(Outer(), {"steps": 20, "inner": {"folder": "there"}}, "a.yaml")
    assert found == Outer(steps=20, inner=Inner(folder=Path("there")))
    assert filled(Outer(), plain(found), "a.yaml") == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"shares": 1}}, r"a.yaml sets inner.shares, which does not exist: choose from folder, share\."),
        ({"steps": 0}, r"a.yaml sets steps to 0, which must be at least 1\."),
        ({"inner": {"share": 2}}, r"a.yaml sets inner.share to 2, which must lie in \(0, 1\]\."),
    ],
)
def test_values_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filled(Outer(), values, "a.yaml")


def test_bounds_name_the_flag() -> None:
    check_bounds(Outer())
    with pytest.raises(UserError, match=r"--log-every 0 must be at least 1\."):
        check_bounds(Outer(log_every=0))
    with pytest.raises(UserError, match=r"--inner.share 0.0 must lie in \(0, 1\]\."):
        check_bounds(Outer(inner=Inner(share=0.0)))


def test_what_decides_the_outcome_of_a_run() -> None:
    assert of_run(Outer()) == {"steps": 10, "log_every": 5, "inner": {"share": 0.5, "folder": "here"}}
    assert may_change(Outer()) == ["seeds", "log_every", "inner.folder"]
