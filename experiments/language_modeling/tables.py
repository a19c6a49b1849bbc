"""The shape of the paper's tables 2 and 3: every method on every specific set, before and after fine-tuning, with ranks."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.training.run_dir import write_atomically

MARKDOWN = "tables.md"
PHASES = {"specific_test_loss": "pre-train", "finetuned_specific_test_loss": "fine-tune"}
MEDALS = ("①", "②", "③")


class Cell(NamedTuple):
    """One method on one set in one phase: test loss in nats per byte."""

    mean: float
    std: float | None
    """None for one seed."""
    seeds: int
    rank: int
    """1 for the lowest mean of the set."""


class Key(NamedTuple):
    """Where a cell is."""

    budget: str
    specific_set: str
    phase: str
    method: str


Cells = dict[Key, Cell]


def write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Writes tables.md, tables.csv, tables.json and tables.svg; returns the Markdown.

    Args:
      folder: where to.
      rows: results with `specific_set`, `budget` ("steps" or "seconds"), `method`, `seed` and the test losses; where a loss is
        missing, there is a dash.
    """
    cells = ranked(rows)
    text = "\n\n".join(_markdown(cells, rows, budget) for budget in dict.fromkeys(row["budget"] for row in rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARKDOWN, text + "\n")
    write_atomically(folder / "tables.csv", _csv(cells))
    write_atomically(folder / "tables.json", json.dumps(list(rows), indent=2) + "\n")
    if cells:
        _plot(cells, folder / "tables.svg")
    return text


def ranked(rows: Sequence[dict[str, Any]]) -> Cells:
    """Mean and standard deviation over seeds, and the rank among the methods; a phase that no row has is left out."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        for phase in PHASES:
            if row.get(phase) is not None:
                values.setdefault(Key(row["budget"], row["specific_set"], phase, row["method"]), []).append(row[phase])
    means = {key: float(np.mean(found)) for key, found in values.items()}
    cells = {}
    for key, found in values.items():
        rivals = [mean for other, mean in means.items() if other[:3] == key[:3]]
        std = float(np.std(found, ddof=1)) if len(found) > 1 else None
        cells[key] = Cell(means[key], std, len(found), 1 + sum(mean < means[key] for mean in rivals))
    return cells


def _markdown(cells: Cells, rows: Sequence[dict[str, Any]], budget: str) -> str:
    sets, methods = (
        list(dict.fromkeys(row[name] for row in rows if row["budget"] == budget)) for name in ("specific_set", "method")
    )
    phases = [phase for phase in PHASES if any((key.budget, key.phase) == (budget, phase) for key in cells)] or list(
        PHASES
    )[:1]
    runs = Counter((row["specific_set"], row["method"]) for row in rows if row["budget"] == budget)
    columns = [(s, p) for s in sets for p in phases]
    most = {c: max((cell.seeds for key, cell in cells.items() if key[:3] == (budget, *c)), default=0) for c in columns}
    heads = [f"{s}, {PHASES[p]}" for s, p in columns] + [f"mean rank, {PHASES[p]}" for p in phases]
    lines = [f"Test loss in nats per byte, the same budget of {budget} for every method:", ""]
    lines += ["| method | " + " | ".join(heads) + " |", "|" + " --- |" * (len(heads) + 1)]
    for method in methods:
        own = [_show(cells.get(Key(budget, s, p, method)), runs[s, method], most[s, p]) for s, p in columns]
        means = [_mean_rank(cells, budget, sets, p, method) for p in phases]
        lines.append(f"| {method} | " + " | ".join(own + means) + " |")
    return "\n".join(lines)


def _show(cell: Cell | None, runs: int, most: int) -> str:
    """A cell; where some of the runs have no such loss, or another method has more seeds, the number of seeds too."""
    if cell is None:
        return "–"
    medal = f" {MEDALS[cell.rank - 1]}" if cell.rank <= len(MEDALS) else ""
    seeds = f"{cell.seeds} of {runs} seeds" if cell.seeds < runs else f"{cell.seeds} seed{'s' * (cell.seeds > 1)}"
    fewer = f" ({seeds})" if cell.seeds < max(runs, most) else ""
    return f"{cell.mean:.3f}" + ("" if cell.std is None else f" ± {cell.std:.3f}") + fewer + medal


def _mean_rank(cells: Cells, budget: str, sets: Sequence[str], phase: str, method: str) -> str:
    found = [cells.get(Key(budget, s, phase, method)) for s in sets]
    known = [cell.rank for cell in found if cell is not None]
    return f"{np.mean(known):.1f}" if len(known) == len(sets) else "–"


def _csv(cells: Cells) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["budget", "specific_set", "phase", "method", *Cell._fields])
    for key, cell in cells.items():
        writer.writerow([key.budget, key.specific_set, PHASES[key.phase], key.method, *cell])
    return file.getvalue()


def _plot(cells: Cells, path: Path) -> None:
    """A panel for each set and budget: test loss of each method, before and after fine-tuning."""
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
                    [cell.mean for _, cell in found],
                    [i for i, _ in found],
                    xerr=[cell.std or 0.0 for _, cell in found],
                    fmt=marker,
                    capsize=2,
                    label=PHASES[phase],
                )
        panel.set_title(f"{name}, same {budget}", fontsize=9)
        panel.set_xlabel("test loss, nats per byte")
        panel.grid(alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.savefig(path)
