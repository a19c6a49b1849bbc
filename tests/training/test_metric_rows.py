"""The file of metrics."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel.training import MetricsWriter, read_metrics
from bilevel.training.metrics import best_before_the_end, even_intervals, first_reaching, mean_of
from bilevel.types import UserError


def write(path: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsWriter(path, resume_step) as writer:
        for step in steps:
            writer.write(step, step / 2, {"loss": 1.0 / step})


def test_round_trip_with_nan(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(3, 0.5, {"loss": math.nan, "other": math.inf, "fine": 2})
        assert path.read_text() == '{"step": 3, "seconds": 0.5, "loss": null, "other": null, "fine": 2.0}\n'
    (row,) = read_metrics(path)
    assert row["step"] == 3
    assert math.isnan(row["loss"])
    assert row["fine"] == 2.0


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 10), resume_step=4)
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 10))
    with MetricsWriter(path, 0) as writer:
        assert writer.rows == []
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 4, "sec', "{", '{"step": 3, "seconds": 1.5, "loss": 0.3}', "\x00\x00\x00"])
def test_torn_last_line(tmp_path: Path, torn: str):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:2]) + torn)  # the third is a whole row that only lacks its line end
    assert [row["step"] for row in read_metrics(path)][:2] == [1, 2]
    write(path, range(3, 5), resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_row_without_its_line_end_is_completed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    path.write_text(path.read_text().rstrip("\n"))
    write(path, range(4, 5), resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 0}\noops\n{"step": 3, "seconds": 0}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        read_metrics(path)


def test_a_step_twice_is_refused(tmp_path: Path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(3, 0.5, {})
        with pytest.raises(ValueError, match="step 3 follows that of step 3"):
            writer.write(3, 0.6, {})


def test_unreadable_and_unwritable(tmp_path: Path):
    with pytest.raises(UserError, match=r"Cannot read the metrics file .*absent\.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"Cannot write .*metrics\.jsonl"):
        MetricsWriter(tmp_path / "absent" / "metrics.jsonl")


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'bilevel\[tensorboard\]'"):
        MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "events")


def test_intervals_that_a_stop_cut_are_joined_by_their_steps():
    rows = [
        {"step": 50, "a": 1.0, "b": 1.0},
        {"step": 60, "a": 0.0, "b": math.nan, "c": 7.0},
        {"step": 100, "a": 1.0, "b": 3.0},
        {"step": 150, "a": 2.0, "b": 4.0},
        {"step": 151, "a": 9.0, "b": 9.0},
    ]
    assert even_intervals(rows, ["a", "b"]) == [
        {"step": 50, "a": 1.0, "b": 1.0},
        {"step": 100, "a": 0.8, "b": 3.0},
        {"step": 150, "a": 2.0, "b": 4.0},
    ]
    assert even_intervals(rows[:1], ["a"]) == [{"step": 50, "a": 1.0}]
    assert (
        even_intervals([], ["a"]) == even_intervals(rows, ["d"]) == even_intervals([{"step": 0, "a": 1.0}], ["a"]) == []
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk that is always full")
def test_a_full_disk_is_told(tmp_path: Path):
    def fills_up() -> None:
        with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
            writer._file.close()
            writer._file = open("/dev/full", "w")  # noqa: SIM115 (closed by the writer)
            writer.write(1, 0.0, {"loss": 1.0})

    with pytest.raises(UserError, match=r"Cannot write .*metrics.jsonl \(No space left on device\)"):
        fills_up()


def test_the_first_row_that_reaches_a_value() -> None:
    found = [{"step": 1}, {"step": 2, "test_accuracy": 0.4}, {"step": 4, "test_accuracy": 0.8}]

    def steps(lower_is_better: bool, *values: float) -> list[Any]:
        at = [first_reaching(found, "test_accuracy", value, lower_is_better=lower_is_better) for value in values]
        return [row and row["step"] for row in at]

    assert steps(False, 0.3, 0.4, 0.5, 0.9) == [2, 2, 4, None]
    assert steps(True, 0.3, 0.4, 0.9) == [None, 2, 2]


def test_means_leave_out_rows_without_the_number() -> None:
    assert mean_of([{"loss": 4.0}, {"loss": None}, {}, {"loss": 1.0}], "loss") == 2.5
    assert mean_of([{"loss": 4.0}], "accuracy") is None


def test_the_best_row_before_a_worse_end() -> None:
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 1.0), (3, 1.0), (4, 2.0))]
    assert best_before_the_end(rows, "loss", lower_is_better=True) == {"step": 2, "loss": 1.0}
    assert best_before_the_end(rows[:3], "loss", lower_is_better=True) is None
    assert best_before_the_end([], "loss", lower_is_better=True) is None
