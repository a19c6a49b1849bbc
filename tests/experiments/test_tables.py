"""Tables over methods and seeds."""

import errno
import math

import pytest

from bilevel.types import UserError
from experiments import cli
from experiments.cli import chosen_methods
from experiments.language_modeling.config import DataConfig
from experiments.tables import Column, by_method, mean_cell


def test_one_line_a_method() -> None:
    columns = {"loss": Column("test loss", 2), "steps": Column("steps"), "none": Column("nowhere")}
    rows = [
        {"method": "b", "loss": 1.0, "steps": 10},
        {"method": "b", "loss": 2.0, "steps": None},
        {"method": "a", "loss": 3.0, "steps": 20.4},
    ]
    assert by_method(rows, columns).splitlines() == [
        "| method | seeds | test loss | steps |",
        "| --- | --- | --- | --- |",
        "| b | 2 | 1.50 ± 0.71 | – |",
        "| a | 1 | 3.00 | 20 |",
    ]
    rows += [{"method": "b", "seed": 2}, {"method": "c", "seed": 0}]
    assert by_method(rows, columns).splitlines()[2:] == [
        "| b | 2 of 3 | 1.50 ± 0.71 | – |",
        "| a | 1 | 3.00 | 20 |",
        "| c | 0 of 1 | – | – |",
    ]
    assert mean_cell([math.nan], 1) == mean_cell([], 1) == "–"


def test_methods_by_name() -> None:
    known, everything = ("a", "b", "c"), ("a", "b")
    assert chosen_methods(None, "b, a,b", known, everything) == ["b", "a"]
    assert chosen_methods(None, "all", known, everything) == ["a", "b"]
    assert chosen_methods(None, "c,all", known, everything) == ["c", "a", "b"]
    assert chosen_methods("c", "all", known, everything) == ["c"]
    with pytest.raises(UserError, match='names the method "d", which does not exist: choose from all, a, b, c'):
        chosen_methods(None, "d", known, everything)
    with pytest.raises(UserError, match="--compare is empty"):
        chosen_methods(None, ",", known, everything)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/metrics.jsonl"), 2, ["a/metrics.jsonl", "make room"]),
        (UserError("This is wrong: change it."), 2, ["error: This is wrong: change it."]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
    ],
)
def test_what_ends_a_command(
    raised: BaseException, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: DataConfig) -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        cli.run(DataConfig, main, [])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert all(word in error for word in words)
