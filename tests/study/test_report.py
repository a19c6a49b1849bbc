"""The HTML report."""

from __future__ import annotations

import base64
import math
import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.study.comparison import even_at_the_end, worse_at_the_end
from bilevel.study.report import Picture, Report, Text, domains, over_training, write_report
from bilevel.study.task import Measure
from bilevel.training.charts import Line, draw, mean_line
from bilevel.training.metrics import narrowed
from bilevel.training.tables import Table
from bilevel.types import UserError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def rows(offset: float, shares: bool = True) -> list[dict[str, float]]:
    return [
        {"step": step, "seconds": step / 100, "effective_sample_size": 1000.0 / step}
        | ({"valid_loss": offset + 1 / step} if step % 20 == 0 else {})
        | ({"share/law": step / 1000, "share/<b>": 1 - step / 1000} if shares else {})
        for step in range(10, 101, 10)
    ]


def report(path: Path, **more: Any) -> str:
    write_report(path / "report.html", Report("A <title>", **more))
    return (path / "report.html").read_text(encoding="utf-8")


def images(html: str) -> list[str]:
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)"', html)
    return [base64.b64decode(text).decode() for text in found]


class Balanced(HTMLParser):
    """Fails when tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_whole_report(tmp_path: Path):
    runs = {method: [rows(seed) for seed in (0, 1)] for method in ("uniform", "DDS")}
    sections = [
        *over_training(runs, "valid_loss", "Valid <loss>", "nats", seconds=True),
        *over_training(runs, "effective_sample_size", "Size", "rows", log_y=True, about="What & why"),
        *domains(runs, {"law": 0.02, "<b>": 0.98}),
    ]
    text = report(
        tmp_path,
        introduction="Where & when",
        settings=Table(["setting", "value"], [["model.width", "8"], ["name", "<x>"]]),
        summary=Table(["method", "test loss"], [["DDS", "0.51 ± 0.71"]]),
        runs=Table(["method", "seed"], [["DDS", "1"]]),
        sections=sections,
        ranked={
            "highest": [Text(3.25, "law", "<script>alert('x')</script> see http://example.org")],
            "lowest": [Text(-4.5, "<b>", "cut \udce2 here" + "long " * 1000)],
        },
    )
    assert len(images(text)) == 5  # loss by step and by second, sample size, domains of two methods
    for svg in images(text):
        assert "<svg" in svg
    for heading in (
        "Summary",
        "Valid &lt;loss&gt;",
        "Size",
        "Domains selected by DDS",
        "Highest-weighted generic rows",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert not re.search(r"""(src|href|srcset)\s*=\s*["'](?!data:)""", text)
    assert "url(" not in text
    assert "@import" not in text
    for part in (
        "A &lt;title&gt;",
        "model.width",
        "&lt;x&gt;",
        "Where &amp; when",
        "What &amp; why",
        "score 3.25",
        "…",
    ):
        assert part in text
    assert "<td>law</td><td>2</td><td>10</td><td>5</td>" in text  # share in generic, at the end, ratio
    assert "<td>DDS</td><td>0.51 ± 0.71</td>" in text
    assert "<td>DDS</td><td>1</td>" in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def test_sections_without_data_are_left_out(tmp_path: Path):
    runs = {"uniform": [rows(0.0, shares=False)], "soba": [[]]}
    assert over_training(runs, "accuracy", "Accuracy", "share") == over_training({}, "valid_loss", "Loss", "nats") == []
    assert domains(runs, {"law": 0.02}) == domains(runs, {}) == []
    text = report(tmp_path)
    assert images(text) == []
    for words in ("<h2>", "<table>", "<details>", "generic rows"):
        assert words not in text


def test_rows_that_are_pictures(tmp_path: Path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    text = report(tmp_path, ranked={"highest": [Picture("cat & 3.1", svg)], "lowest": [Text(1.0, "", "two\nlines")]})
    Balanced().feed(text)
    assert images(text) == [svg]
    assert "<figcaption>cat &amp; 3.1</figcaption>" in text
    assert "<pre>two\nlines</pre>" in text
    assert "<h2>Highest-weighted generic rows</h2>" in text


def test_same_runs_give_the_same_charts():
    runs = {"DDS": [[{"step": 1, "seconds": 1.0, "effective_sample_size": 2.0}]]}
    one, other = (over_training(runs, "effective_sample_size", "Size", "rows") for _ in range(2))
    assert one == other


def test_at_most_eight_domains_by_gain():
    generic = {f"d{i}": (i + 1) / 66 for i in range(11)}
    selected = [{"step": s, "seconds": 1.0} | {f"share/{name}": 1 / 11 for name in generic} for s in (1, 2)]
    (found,) = domains({"DDS": [selected]}, generic)
    assert found.table is not None
    assert [line[0] for line in found.table.lines] == [f"d{i}" for i in range(8)]


def test_a_domain_without_generic_rows_has_no_ratio():
    selected = [{"step": 1, "seconds": 1.0, "share/none": 0.5}]
    (found,) = domains({"DDS": [selected]}, {"none": 0.0})
    assert found.table is not None
    assert found.table.lines == [["none", "0", "50", "–"]]


def test_mean_over_seeds_at_common_steps():
    one = [{"step": 1, "seconds": 1.0, "m": 1.0}, {"step": 2, "seconds": 2.0, "m": 3.0}]
    two = [{"step": 2, "seconds": 4.0, "m": 5.0}, {"step": 3, "seconds": 6.0, "m": float("nan")}]
    line = mean_line("x", [one, two, []], "m", "seconds")
    np.testing.assert_array_equal(line.x, [3.0])
    np.testing.assert_array_equal(line.y, [4.0])
    assert len(line.thin) == 2
    np.testing.assert_array_equal(line.thin[1], [[4.0], [5.0]])


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_names_the_extra(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'bilevel\[experiments\]'"):
        report(tmp_path, sections=over_training({"DDS": [rows(0.0)]}, "valid_loss", "Loss", "nats"))


def test_every_line_of_a_chart_is_in_the_legend():
    steps = np.arange(3.0)
    for label in ("_pydecimal", "$a$ & $b$", "日本"):
        drawn = draw([Line(label, steps, steps)], x_label="x", y_label="y")
        assert re.search(f"<!-- +{re.escape(escape(label, quote=False))} -->", drawn), label


def test_a_method_has_its_colour_in_every_chart():
    plain = [{"step": step, "seconds": float(step), "valid_loss": 1.0} for step in (1, 2)]
    runs = {"uniform": [plain], "soba": [[row | {"effective_sample_size": 2.0} for row in plain]]}
    ((loss,),) = [section.charts for section in over_training(runs, "valid_loss", "Loss", "nats")]
    ((size,),) = [section.charts for section in over_training(runs, "effective_sample_size", "Size", "rows")]
    blue, orange = "#0072b2", "#e69f00"
    assert blue in loss.svg
    assert orange in loss.svg
    assert orange in size.svg
    assert blue not in size.svg


def test_a_stop_between_two_rows_of_metrics_leaves_no_peak() -> None:
    """One step of the domain alone, a stop, and 49 steps without it: 2 % of the interval, as if it had run through."""
    steady = [{"step": step, "seconds": 1.0, "share/law": 0.02} for step in range(50, 501, 50)]
    stopped = [*steady[:-1], {"step": 451, "seconds": 1.0, "share/law": 1.0}, steady[-1] | {"share/law": 0.0}]
    found = [domains({"soba": [rows]}, {"law": 0.01}) for rows in (steady, stopped)]
    assert found[0] == found[1]
    table = found[0][0].table
    assert table is not None
    assert table.lines == [["law", "1", "2", "2"]]


@pytest.mark.parametrize(
    ("values", "warned"),
    [([0.1, 0.9, 0.7], True), ([0.1, 0.9, 0.88], False), ([0.5, 0.4], True), ([0.5], False), ([], False)],
)
def test_a_run_that_was_better_before_its_end_gets_a_warning(values: list[float], warned: bool) -> None:
    rows = [{"step": 25 * (i + 1), "valid_accuracy": value} for i, value in enumerate(values)]
    found = worse_at_the_end(rows, Measure("accuracy", "accuracy", lower_is_better=False))
    assert (found is not None) == warned
    if found is not None:
        best = max(values)
        assert f"best at step {25 * (values.index(best) + 1)} ({best:.3f}) and ended at {values[-1]:.3f}" in found
    losses = [{**row, "valid_loss": -row["valid_accuracy"]} for row in rows]
    assert (worse_at_the_end(losses, Measure("loss", "loss")) is not None) == warned


def test_a_sampler_that_draws_from_fewer_rows_than_a_batch_gets_a_warning() -> None:
    sizes = [None, 30.0, 16.0, 15.5, 20.0]
    rows = [{"step": 10 * (i + 1), "effective_sample_size": size} for i, size in enumerate(sizes)]
    assert narrowed(rows[:3], 16, "advice") is narrowed([], 16, "advice") is None
    found = narrowed(rows, 16, "advice")
    assert found is not None
    assert found.startswith("by step 40 ")
    assert "was 15.5, below the 16 of a batch, and at the end it was 20.0: advice." in found


@pytest.mark.parametrize(
    ("step", "spread", "gradient", "warned"),
    [(6000, 1e-4, 1e-5, True), (6000, 0.3, 1e-5, False), (100, 1e-4, 1e-5, False), (6000, 1e-4, math.nan, False)],
)
def test_logits_that_hardly_differ(step: int, spread: float, gradient: float, warned: bool) -> None:
    """Not in the first steps, where they begin at 0, nor for methods that learn no network."""
    rows = [{"step": 50, "logit_rms": 0.2, "weight_gradient_norm": 1.0}] if warned else []
    rows = [
        *rows,
        {"step": step, "logit_rms": spread, "weight_gradient_norm": gradient},
        {"step": step, "valid_loss": 1.0},
    ]
    found = even_at_the_end(rows, "warm_soba")
    assert (found is not None) == warned
    if found:
        assert "--warm-soba.shift-pull 0.05" in found
