"""The shape of ATD's tables 2 and 3: every method on every specific set, before and after fine-tuning, with ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.study import files
from bilevel.study.tables import csv_text, markdown
from bilevel.study.task import Measure
from bilevel.training.run_dir import write_atomically

MARKDOWN = "tables.md"
PHASES = {"": "pre-train", "finetuned_": "fine-tune"}
"""How the name of a result begins -> the phase."""
MEDALS = ("①", "②", "③")


class Cell(NamedTuple):
    """One method on one set in one phase: the deciding measure on test."""

    mean: float
    std: float | None
    """None for one seed."""
    seeds: int
    rank: int
    """1 for the best mean of the set."""


class Key(NamedTuple):
    """Where a cell is."""

    budget: str
    specific_set: str
    phase: str
    method: str


Cells = dict[Key, Cell]


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], measure: Measure) -> str:
    """Write tables.md, tables.csv, tables.json and tables.svg; return the Markdown.

    Args:
      folder: where to.
      rows: results with `specific_set`, `budget` ("steps" or "seconds"), `method`, `seed` and the measure on test; where it is
        missing, there is a dash.
      measure: the one that decides.
    """
    cells = ranked(rows, measure)
    budgets = dict.fromkeys(row["budget"] for row in rows)
    text = "\n\n".join(_markdown(cells, rows, budget, measure) for budget in budgets)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARKDOWN, text + "\n")
    head = ["budget", "specific_set", "phase", "method", *Cell._fields]
    lines = [[key.budget, key.specific_set, PHASES[key.phase], key.method, *cell] for key, cell in cells.items()]
    write_atomically(folder / "tables.csv", csv_text(head, lines))
    files.write_json(folder / "tables.json", list(rows))
    if cells:
        _plot(cells, folder / "tables.svg", measure)
    return text


def ranked(rows: Sequence[dict[str, Any]], measure: Measure) -> Cells:
    """Return mean and standard deviation over seeds, and the rank among the methods; a phase that no row has is left out."""
    sign = 1 if measure.lower_is_better else -1
    values: dict[Key, list[float]] = {}
    for row in rows:
        for phase in PHASES:
            if (value := row.get(f"{phase}test_{measure.name}")) is not None:
                values.setdefault(Key(row["budget"], row["specific_set"], phase, row["method"]), []).append(value)
    means = {key: float(np.mean(found)) for key, found in values.items()}
    cells = {}
    for key, found in values.items():
        rivals = [mean for other, mean in means.items() if other[:3] == key[:3]]
        std = float(np.std(found, ddof=1)) if len(found) > 1 else None
        cells[key] = Cell(means[key], std, len(found), 1 + sum(sign * m < sign * means[key] for m in rivals))
    return cells


def _markdown(cells: Cells, rows: Sequence[dict[str, Any]], budget: str, measure: Measure) -> str:
    own_rows = [row for row in rows if row["budget"] == budget]
    sets, methods = (list(dict.fromkeys(row[name] for row in own_rows)) for name in ("specific_set", "method"))
    known = {key.phase for key in cells if key.budget == budget}
    phases = [phase for phase in PHASES if phase in known] or list(PHASES)[:1]
    runs = Counter((row["specific_set"], row["method"]) for row in own_rows)
    columns = [(s, p) for s in sets for p in phases]
    most = {c: max((cell.seeds for key, cell in cells.items() if key[:3] == (budget, *c)), default=0) for c in columns}
    heads = [f"{s}, {PHASES[p]}" for s, p in columns] + [f"mean rank, {PHASES[p]}" for p in phases]
    lines = []
    for method in methods:
        own = [_show(cells.get(Key(budget, s, p, method)), runs[s, method], most[s, p], measure) for s, p in columns]
        lines.append([method, *own, *(_mean_rank(cells, budget, sets, p, method) for p in phases)])
    unit = f" in {measure.unit}" if measure.unit else ""
    title = f"Test {measure.title}{unit}, the same budget of {budget} for every method:"
    return f"{title}\n\n{markdown(['method', *heads], lines)}"


def _show(cell: Cell | None, runs: int, most: int, measure: Measure) -> str:
    """A cell; where some of the runs have no such value, or another method has more seeds, the number of seeds too."""
    if cell is None:
        return "–"
    medal = f" {MEDALS[cell.rank - 1]}" if cell.rank <= len(MEDALS) else ""
    seeds = f"{cell.seeds} of {runs} seeds" if cell.seeds < runs else f"{cell.seeds} seed{'s' * (cell.seeds > 1)}"
    fewer = f" ({seeds})" if cell.seeds < max(runs, most) else ""
    d = measure.digits
    return f"{cell.mean:.{d}f}" + ("" if cell.std is None else f" ± {cell.std:.{d}f}") + fewer + medal


def _mean_rank(cells: Cells, budget: str, sets: Sequence[str], phase: str, method: str) -> str:
    found = [cells.get(Key(budget, s, phase, method)) for s in sets]
    known = [cell.rank for cell in found if cell is not None]
    return f"{np.mean(known):.1f}" if len(known) == len(sets) else "–"


def _plot(cells: Cells, path: Path, measure: Measure) -> None:
    """A panel for each set and budget: the measure of each method, before and after fine-tuning."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((key.budget, key.specific_set) for key in cells))
    methods = list(dict.fromkeys(key.method for key in cells))
    figure = Figure(figsize=(3.2 * len(panels) + 1.5, 0.28 * len(methods) + 1.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (budget, name), panel in zip(panels, axes, strict=True):
        for phase, marker in zip(PHASES, ("o", "D"), strict=True):
            own = [(i, cells.get(Key(budget, name, phase, method))) for i, method in enumerate(methods)]
            found = [(i, cell) for i, cell in own if cell is not None]
            if found:
                panel.errorbar(
                    [cell.mean for _, cell in found], [i for i, _ in found], xerr=[cell.std or 0.0 for _, cell in found],
                    fmt=marker, capsize=2, label=PHASES[phase],
                )  # fmt: skip
        panel.set_title(f"{name}, same {budget}", fontsize=9)
        panel.set_xlabel(f"test {measure.title}" + (f", {measure.unit}" if measure.unit else ""))
        panel.grid(alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.savefig(path)
