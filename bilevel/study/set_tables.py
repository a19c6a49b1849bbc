"""The shape of ATD's tables 2 and 3: every method on every specific set, before and after fine-tuning, with ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bilevel.study.task import Measure
from bilevel.training.charts import draw_dots
from bilevel.training.run_dir import write_atomically, write_json
from bilevel.training.tables import NOTHING, Table, plus_minus

MARKDOWN = "tables.md"
PHASES = {"test": "pre-train", "finetuned_test": "fine-tune"}
"""How the name of a result begins -> the phase."""
KEYS = ["budget", "specific_set", "method", "phase"]
MEDALS = ("①", "②", "③")


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], measure: Measure) -> str:
    """Write tables.md, tables.csv, tables.json and tables.svg; return the Markdown.

    Rows have `specific_set`, `budget` ("steps" or "seconds"), `method`, `seed` and the measure on test; where it is missing,
    there is a dash.
    """
    cells = ranked(rows, measure)
    text = "\n\n".join(_markdown(cells, rows, budget, measure) for budget in dict.fromkeys(r["budget"] for r in rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARKDOWN, text + "\n")
    write_atomically(folder / "tables.csv", cells[["mean", "std", "seeds", "rank"]].to_csv())
    write_json(folder / "tables.json", rows)
    if len(cells):
        _plot(cells, folder / "tables.svg", measure)
    return text


def ranked(rows: Sequence[dict[str, Any]], measure: Measure) -> pd.DataFrame:
    """Return `mean`, `std` and number of `seeds` of the measure by KEYS, and its `rank` among the methods: 1 is the best.

    Of the `runs` of a cell some may have no value; `most` is the largest number of seeds that a method has.
    """
    names = {f"{begin}_{measure.name}": phase for begin, phase in PHASES.items()}
    results = pd.DataFrame(rows).rename(columns=names).reindex(columns=[*KEYS[:3], *names.values()])
    values = results.melt(KEYS[:3], var_name="phase").astype({"value": float})
    cells: Any = values.groupby(KEYS, sort=False)["value"].agg(mean="mean", std="std", seeds="count", runs="size")
    among = (cells := cells[cells["seeds"] > 0]).groupby(["budget", "specific_set", "phase"])
    rank = among["mean"].rank("min", ascending=measure.lower_is_better).astype(int)
    return cells.assign(rank=rank, most=among["seeds"].transform("max"))


def _markdown(cells: pd.DataFrame, rows: Sequence[dict[str, Any]], budget: str, measure: Measure) -> str:
    """The table of one budget: a column for each set and phase, and the mean rank over the sets."""
    own = [row for row in rows if row["budget"] == budget]
    sets, methods = (list(dict.fromkeys(row[name] for row in own)) for name in ("specific_set", "method"))
    here: Any = cells[cells.index.get_level_values("budget") == budget].droplevel("budget")
    texts = {cell.Index: _show(cell, measure) for cell in here.itertuples()}
    ranks = here["rank"].to_dict()
    phases = [phase for phase in PHASES.values() if phase in here.index.unique("phase")] or ["pre-train"]
    columns: dict[str, list[str]] = {"method": methods}
    for name, phase in itertools.product(sets, phases):
        columns[f"{name}, {phase}"] = [texts.get((name, method, phase), NOTHING) for method in methods]
    for phase in phases:
        of_method = [[ranks.get((name, method, phase), np.nan) for name in sets] for method in methods]
        columns[f"mean rank, {phase}"] = [NOTHING if np.isnan(r).any() else f"{np.mean(r):.1f}" for r in of_method]
    table = Table(list(columns), list(zip(*columns.values(), strict=True)))
    unit = f" in {measure.unit}" if measure.unit else ""
    return f"Test {measure.title}{unit}, the same budget of {budget} for every method:\n\n{table}"


def _show(cell: Any, measure: Measure) -> str:
    """A cell; where some of the runs have no such value, or another method has more seeds, the number of seeds too."""
    medal = f" {MEDALS[cell.rank - 1]}" if cell.rank <= len(MEDALS) else ""
    seeds = f"{cell.seeds} seed{'s' * (cell.seeds > 1)}"
    if cell.seeds < cell.runs:
        seeds = f"{cell.seeds} of {cell.runs} seeds"
    fewer = f" ({seeds})" if cell.seeds < max(cell.runs, cell.most) else ""
    return plus_minus(cell.mean, cell.std, measure.digits) + fewer + medal


def _plot(cells: pd.DataFrame, path: Path, measure: Measure) -> None:
    """A panel for each set and budget: the measure of each method, before and after fine-tuning."""
    panels: Any = {}
    for cell in cells.fillna({"std": 0.0}).reset_index().to_dict("records"):
        series = panels.setdefault(f"{cell['specific_set']}, same {cell['budget']}", {})
        series.setdefault(cell["phase"], {})[cell["method"]] = cell["mean"], cell["std"]
    title = f"test {measure.title}" + (f", {measure.unit}" if measure.unit else "")
    write_atomically(path, draw_dots(panels, list(cells.index.unique("method")), x_label=title))
