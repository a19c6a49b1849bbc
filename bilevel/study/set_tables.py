"""The shape of ATD's tables 2 and 3: every method on every specific set, before and after fine-tuning, with ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bilevel.study.task import Measure
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
    write_atomically(folder / "tables.csv", cells.to_csv())
    write_json(folder / "tables.json", rows)
    if len(cells):
        _plot(cells, folder / "tables.svg", measure)
    return text


def ranked(rows: Sequence[dict[str, Any]], measure: Measure) -> pd.DataFrame:
    """Return `mean`, `std` and number of `seeds` of the measure by KEYS, and its `rank` among the methods: 1 is the best."""
    names = {f"{begin}_{measure.name}": phase for begin, phase in PHASES.items()}
    results = pd.DataFrame(rows).rename(columns=names).reindex(columns=[*KEYS[:3], *names.values()])
    values = results.melt(KEYS[:3], var_name="phase").dropna().astype({"value": float})
    cells = values.groupby(KEYS, sort=False)["value"].agg(mean="mean", std="std", seeds="count")
    among = cells.groupby(["budget", "specific_set", "phase"])["mean"]
    return cells.assign(rank=among.rank("min", ascending=measure.lower_is_better).astype(int))


def _markdown(cells: pd.DataFrame, rows: Sequence[dict[str, Any]], budget: str, measure: Measure) -> str:
    """The table of one budget: a column for each set and phase, and the mean rank over the sets."""
    own = [row for row in rows if row["budget"] == budget]
    sets, methods = (list(dict.fromkeys(row[name] for row in own)) for name in ("specific_set", "method"))
    runs = Counter((row["specific_set"], row["method"]) for row in own)
    here: Any = cells[cells.index.get_level_values("budget") == budget].droplevel("budget")
    most = here.groupby(["specific_set", "phase"])["seeds"].transform("max")
    here = here.assign(most=most, runs=[runs[name, method] for name, method, _ in here.index])
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
    from matplotlib.figure import Figure

    panels: Any = cells.groupby(["budget", "specific_set"], sort=False)
    methods = cells.index.unique("method")
    figure = Figure(figsize=(3.2 * len(panels) + 1.5, 0.28 * len(methods) + 1.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, ((budget, name), of_set) in zip(axes, panels, strict=True):
        for phase, own in of_set.groupby("phase", sort=False):
            places = methods.get_indexer(own.index.get_level_values("method"))
            panel.errorbar(
                own["mean"], places, xerr=own["std"].fillna(0), fmt="oD"[phase == "fine-tune"], capsize=2, label=phase
            )
        panel.set_title(f"{name}, same {budget}", fontsize=9)
        panel.set_xlabel(f"test {measure.title}" + (f", {measure.unit}" if measure.unit else ""))
        panel.grid(alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.savefig(path)
