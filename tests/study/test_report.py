"""The HTML report."""

from __future__ import annotations

import base64
import math
import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bilevel.study.report import Curve, Picture, RunRecord, Text, write_report
from bilevel.study.report.charts import Line, draw, mean_line, series
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


def report(path: Path, runs: list[RunRecord], **more: object) -> str:
    options = {"title": "A <title>", "settings": {"model": {"width": 8}, "name": "<x>"}} | more
    write_report(path / "report.html", runs, **options)  # pyright: ignore[reportArgumentType]
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
    runs = [RunRecord(method, seed, rows(seed)) for method in ("uniform", "DDS") for seed in (0, 1)]
    text = report(
        tmp_path,
        runs,
        introduction="What & why",
        generic_shares={"law": 0.02, "<b>": 0.98},
        highest=[Text(3.25, "law", "<script>alert('x')</script> see http://example.org")],
        lowest=[Text(-4.5, "<b>", "cut \udce2 here" + "long " * 1000)],
    )
    assert len(images(text)) == 5  # loss by step and by second, sample size, domains of two methods
    for svg in images(text):
        assert "<svg" in svg
    for heading in ("Summary", "Valid loss", "Effective sample size", "Domains"):
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
        "What &amp; why",
        "score 3.25",
        "score -4.5",
        "…",
    ):
        assert part in text
    assert "<td>law</td><td>2</td><td>10</td><td>5</td>" in text  # share in generic, at the end, ratio
    assert "<td>DDS</td><td>2</td><td>100</td><td>1</td><td>0.51 ± 0.71</td>" in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def test_sections_without_data_are_left_out(tmp_path: Path):
    text = report(tmp_path, [RunRecord("uniform", 0, rows(0.0, shares=False), {"test loss": 1.23456, "ok": True})])
    assert len(images(text)) == 3
    assert "Domains" not in text
    assert "generic rows" not in text
    assert "<td>1.235</td><td>True</td>" in text
    assert images(report(tmp_path, [])) == []
    assert images(report(tmp_path, [RunRecord("uniform", 0, [])])) == []


def test_further_curves_and_pictures(tmp_path: Path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    curves = [Curve("effective_sample_size", "Size <now>", "rows"), Curve("accuracy", "Not in the rows", "share")]
    text = report(tmp_path, [RunRecord("DDS", 0, rows(0))], curves=curves, pictures=[Picture("The <picture>", svg)])
    Balanced().feed(text)
    assert "<h2>Size &lt;now&gt;</h2>" in text
    assert "Not in the rows" not in text
    assert "<h2>The &lt;picture&gt;</h2>" in text
    assert svg in images(text)


def test_rows_that_are_pictures(tmp_path: Path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    text = report(tmp_path, [], highest=[Picture("cat & 3.1", svg)], lowest=[Text(1.0, "", "two\nlines")])
    Balanced().feed(text)
    assert images(text) == [svg]
    assert "<figcaption>cat &amp; 3.1</figcaption>" in text
    assert "<pre>two\nlines</pre>" in text
    assert "<h2>Highest-weighted generic rows</h2>" in text


def test_same_runs_give_the_same_file(tmp_path: Path):
    runs = [RunRecord("DDS", 0, [{"step": 1, "seconds": 1.0, "effective_sample_size": 2.0}])]
    assert report(tmp_path, runs) == report(tmp_path, runs)


def test_at_most_eight_domains_by_ratio(tmp_path: Path):
    generic = {f"d{i}": (i + 1) / 66 for i in range(11)}
    selected = [{"step": s, "seconds": 1.0} | {f"share/{name}": 1 / 11 for name in generic} for s in (1, 2)]
    text = report(tmp_path, [RunRecord("DDS", 0, selected)], generic_shares=generic)
    assert re.findall(r"<tr><td>(d\d+)</td>", text) == [f"d{i}" for i in range(8)]


def test_mean_over_seeds_at_common_steps():
    one = [{"step": 1, "seconds": 1.0, "m": 1.0}, {"step": 2, "seconds": 2.0, "m": 3.0}]
    two = [{"step": 2, "seconds": 4.0, "m": 5.0}, {"step": 3, "seconds": 6.0, "m": float("nan")}]
    line = mean_line("x", [one, two, []], "m", "seconds")
    np.testing.assert_array_equal(line.x, [3.0])
    np.testing.assert_array_equal(line.y, [4.0])
    assert len(line.thin) == 2
    np.testing.assert_array_equal(series(two, "m")[0], [2.0])


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_names_the_extra(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'bilevel\[experiments\]'"):
        report(tmp_path, [RunRecord("DDS", 0, rows(0.0))])


def test_means_over_some_of_the_seeds_say_so(tmp_path: Path):
    given = [{"steps to goal": 100.0, "size": math.nan}, {"size": math.nan}, {"steps to goal": 300.0, "size": math.nan}]
    runs = [RunRecord("a", seed, [], summary) for seed, summary in enumerate(given)]
    text = write_report(tmp_path / "r.html", runs, title="t", settings={}).read_text()
    assert "<td>a</td><td>3</td><td>200 ± 1.4e+02 (2 of 3)</td><td>–</td>" in text


def test_every_line_of_a_chart_is_in_the_legend():
    steps = np.arange(3.0)
    for label in ("_pydecimal", "$a$ & $b$", "日本"):
        drawn = draw([Line(label, steps, steps)], x_label="x", y_label="y")
        assert re.search(f"<!-- +{re.escape(escape(label, quote=False))} -->", drawn), label


def test_a_method_has_its_colour_in_every_chart(tmp_path: Path):
    weighted = {"step": 1, "seconds": 1.0, "valid_loss": 1.0, "effective_sample_size": 2.0}
    plain = {name: value for name, value in weighted.items() if name != "effective_sample_size"}
    runs = [
        RunRecord(method, 0, [row, row | {"step": 2, "seconds": 2.0}])
        for method, row in (("uniform", plain), ("soba", weighted))
    ]
    by_step, by_seconds, sizes = images(report(tmp_path, runs))
    blue, orange = "#0072b2", "#e69f00"
    assert all(color in chart for color in (blue, orange) for chart in (by_step, by_seconds))
    assert orange in sizes
    assert blue not in sizes


def test_a_stop_between_two_rows_of_metrics_leaves_no_peak(tmp_path: Path) -> None:
    """One step of the domain alone, a stop, and 49 steps without it: 2 % of the interval, as if it had run through."""
    steady = [{"step": float(step), "seconds": 1.0, "share/law": 0.02} for step in range(50, 501, 50)]
    stopped = [*steady[:-1], {"step": 451.0, "seconds": 1.0, "share/law": 1.0}, steady[-1] | {"share/law": 0.0}]
    texts = [report(tmp_path, [RunRecord("soba", 0, rows)], generic_shares={"law": 0.01}) for rows in (steady, stopped)]
    assert all("<td>law</td><td>1</td><td>2</td><td>2</td>" in text for text in texts)
    assert texts[0] == texts[1]
