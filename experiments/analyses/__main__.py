"""Analyses of learned weights, after Grangier, Ablin and Hannun (2024), sections 6.1 to 6.4 and appendix B.

    python -m experiments.analyses curriculum
    python -m experiments.analyses filters
    python -m experiments.analyses acceleration --specific-sets news/ law/ medicine/
    python -m experiments.analyses transfer --small small --large large
    python -m experiments.analyses multi_task --specific-sets news/ law/ medicine/

Each prints a table, and writes it (Markdown, JSON) with a plot (SVG) and all runs into --run-dir. The same command continues
an analysis that was stopped, and does not repeat what is finished. Cost: the runs below, for each seed.

    curriculum   one of --method, three of the method frozen
    filters      one for each of --filters
    acceleration two for each of --specific-sets
    transfer     one of the small model, three of the large one
    multi_task   one for each of --compare, and a quarter of one for each fraction that mixing tries
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

from bilevel.training import TrainingDiverged
from experiments import cli
from experiments.analyses.acceleration import Acceleration
from experiments.analyses.analysis import Analysis, Record, Run, record_of, write
from experiments.analyses.curriculum import Curriculum
from experiments.analyses.filters import Filters
from experiments.analyses.multi_task import MultiTask
from experiments.analyses.transfer import Transfer
from experiments.diverged import WHERE, refuse
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.diverged import attempt
from experiments.language_modeling.search import folder_of, searched

Subcommand: TypeAlias = Curriculum | Filters | Acceleration | Transfer | MultiTask
NAMES = {
    Curriculum: "curriculum",
    Filters: "filters",
    Acceleration: "acceleration",
    Transfer: "transfer",
    MultiTask: "multi_task",
}


def main(analysis: Subcommand) -> None:
    """Makes the runs of all seeds, and writes the table and the plot."""
    analysis.check()
    parts = [(part, part.corpora()) for part in analysis.parts()]
    for part, corpora in parts:
        part.check_runs(corpora)
    records = [record for part, corpora in parts for record in _records(part, corpora)]
    name = NAMES[type(analysis)]
    print(write(analysis, name, records))
    print(f"\nPlot: {analysis.run_dir / name}.svg")
    refuse(record.summary for record in records)


def _records(analysis: Analysis, corpora: Corpora) -> Iterator[Record]:
    for seed in range(analysis.seed, analysis.seed + analysis.seeds):
        for planned in analysis.runs(seed):
            if analysis.progress:
                print(f"{planned.label}, seed {seed}", file=sys.stderr)
            summary = _summary(analysis, planned, corpora)
            if WHERE not in summary:
                summary = summary | analysis.measured(planned, corpora)
            yield record_of(planned, summary)


def _summary(analysis: Analysis, planned: Run, corpora: Corpora) -> dict[str, Any]:
    """That of a run; where the runs are apart, of one that diverged what is known."""
    try:
        config = searched(planned.config, planned.method, corpora)
    except TrainingDiverged as error:
        if not analysis.apart:
            raise
        print(f"{planned.label} is left out: {error}", file=sys.stderr)
        where = folder_of(planned.config, planned.method)
        return {"method": planned.method, "seed": planned.seed, WHERE: str(where)}
    return attempt(config, planned.method, planned.seed, corpora, not analysis.apart, planned.variant)


def command(arguments: list[str] | None = None) -> None:
    """Parses the flags, and runs the analysis that they name."""
    subcommands: Any = Subcommand
    cli.run(subcommands, main, arguments)


if __name__ == "__main__":
    command()
