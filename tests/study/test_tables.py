"""Tables over methods and seeds."""

import math

from bilevel.study.tables import Column, by_method, by_run
from bilevel.training.tables import Table


def test_one_line_a_method() -> None:
    columns = {"loss": Column("test loss", 2), "steps": Column("steps"), "none": Column("nowhere")}
    rows = [
        {"method": "b", "loss": 1.0, "steps": 10},
        {"method": "b", "loss": 2.0, "steps": None},
        {"method": "a", "loss": 3.0, "steps": 20.4},
    ]
    assert str(by_method(rows, columns)).splitlines() == [
        "| method | seeds | test loss | steps |",
        "| --- | --- | --- | --- |",
        "| b | 2 | 1.50 ± 0.71 | – |",
        "| a | 1 | 3.00 | 20 |",
    ]
    rows += [{"method": "b", "seed": 2}, {"method": "c", "seed": 0}]
    assert str(by_method(rows, columns)).splitlines()[2:] == [
        "| b | 2 of 3 | 1.50 ± 0.71 | – |",
        "| a | 1 | 3.00 | 20 |",
        "| c | 0 of 1 | – | – |",
    ]


def test_one_line_a_run() -> None:
    rows = [{"method": "a", "seed": 3, "loss": 1.25, "steps": None}, {"method": "a", "seed": 4, "loss": math.nan}]
    table = by_run(rows, {"loss": Column("test loss", 1), "steps": Column("steps"), "none": Column("nowhere")})
    assert table == Table(["method", "seed", "test loss", "steps"], [["a", "3", "1.2", "–"], ["a", "4", "–", "–"]])
