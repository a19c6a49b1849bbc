"""Tables as Markdown, and their cells."""

import math

from bilevel.training.tables import Table, mean_cell


def test_markdown() -> None:
    assert str(Table(["x", "y"], [["a|b", "1"]])) == "| x | y |\n| --- | --- |\n| a\\|b | 1 |"
    assert str(Table(["x"], [])) == "| x |\n| --- |"


def test_cells_of_means() -> None:
    assert mean_cell([1.0, 2.0], 2) == "1.50 ± 0.71"
    assert mean_cell([3.0], 1) == "3.0"
    assert mean_cell([1.0, None], 1) == mean_cell([math.nan], 1) == mean_cell([], 1) == "–"
