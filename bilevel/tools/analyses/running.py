"""The runs of an analysis one after the other, then its table and its plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bilevel.study import diverged, files, flags, search
from bilevel.study.config import Config
from bilevel.study.run import Setting
from bilevel.study.task import Task
from bilevel.tools.analyses.acceleration import Acceleration
from bilevel.tools.analyses.base import Analysis, Planned, Record, record_of, write
from bilevel.tools.analyses.curriculum import Curriculum
from bilevel.tools.analyses.filters import Filters
from bilevel.tools.analyses.multi_task import MultiTask
from bilevel.tools.analyses.transfer import Transfer
from bilevel.training import TrainingDiverged

ANALYSES: dict[str, type[Analysis]] = {
    kind.name: kind for kind in (Curriculum, Filters, Acceleration, Transfer, MultiTask)
}


def command(name: str, task: Task, arguments: Sequence[str], prog: str) -> tuple[Callable[[], None], Any, Path]:
    """Understand a command line, without running it.

    Args:
      name: of the analysis.
      task: what it is made on.
      arguments: after the task's name.
      prog: for --help.

    Returns:
      What runs it, its settings, and the run directory.

    Raises:
      UserError: for flags that do not go together.
    """
    kind = ANALYSES[name]
    found = flags.parse(task, arguments, prog, kind.methods, own=kind, adapt=kind.adapted)
    found.refuse(kind.unused, f"is not for bilevel analyse {name}: omit it.")
    found.config.study.check()
    found.own.check(found.config)
    return lambda: analyse(found.own, found.config, task), (found.config, found.own), found.config.study.run_dir


def analyse(analysis: Analysis, config: Config, task: Task) -> None:
    """Make the runs of all seeds, and write the table and the plot.

    Raises:
      UserError: for data or settings that are not possible, and at the end for runs that diverged.
    """
    settings = analysis.opened(config, task)
    for setting in settings:
        analysis.check_runs(setting)
    records = [record for setting in settings for record in _records(analysis, setting)]
    print(write(analysis, config.study.run_dir, records, task.measures[0]))
    print(f"\nPlot: {config.study.run_dir / analysis.name}.svg")
    diverged.refuse(record.summary for record in records)


def _records(analysis: Analysis, setting: Setting) -> Iterator[Record]:
    for seed in setting.config.study.seed_numbers:
        for planned in analysis.runs(setting, seed):
            if setting.config.study.progress:
                files.say(f"{planned.label}, seed {seed}")
            summary = _summary(analysis, planned)
            if diverged.WHERE not in summary:
                summary = summary | analysis.measured(planned)
            yield record_of(planned, summary)


def _summary(analysis: Analysis, planned: Planned) -> dict[str, Any]:
    """That of a run; where the runs are apart, of one that diverged what is known."""
    setting, method, seed = planned.setting, planned.method, planned.seed
    try:
        config = search.searched(setting, method)
    except TrainingDiverged as error:
        if not analysis.apart:
            raise
        files.say(f"{planned.label} is left out: {error}")
        return {"method": method, "seed": seed, diverged.WHERE: str(search.folder_of(setting.config, method))}
    return diverged.attempt(setting.of(config), method, seed, not analysis.apart, planned.variant)
