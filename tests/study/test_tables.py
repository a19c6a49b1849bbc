"""Tables over methods and seeds."""

import csv
import math

from bilevel.study.tables import Column, by_method, cell, csv_text, markdown, mean_cell, summary_cell


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


def test_markdown_and_csv() -> None:
    lines = [["a|b", 1], ['c, "d"', None]]
    assert markdown(["x", "y"], lines) == '| x | y |\n| --- | --- |\n| a\\|b | 1 |\n| c, "d" | None |'
    assert markdown(["x"], []) == "| x |\n| --- |"
    assert list(csv.reader(csv_text(["x", "y"], lines).splitlines())) == [["x", "y"], ["a|b", "1"], ['c, "d"', ""]]


def test_cells_of_a_summary() -> None:
    assert [cell(v) for v in (None, math.nan, 1.23456, 12345, True, "x")] == ["–", "–", "1.235", "12345", "True", "x"]
    assert summary_cell([1.0, 3.0]) == "2 ± 1.4"
    assert summary_cell([1.0, None, 3.0]) == "2 ± 1.4 (2 of 3)"
    assert summary_cell([5, 5]) == "5"
    assert summary_cell(["a", "b", "a"]) == "a, b"
    assert summary_cell([None, math.nan]) == summary_cell([]) == "–"
