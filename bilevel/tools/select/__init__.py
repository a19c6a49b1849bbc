"""Selects the documents of any corpus that a trained weighting network prefers.

File by file: scores are written for every document; when those of all files are there, the threshold is found, and what is
kept is written. Nothing that is finished is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bilevel.study.task import Task
from bilevel.tools.select.config import Config
from bilevel.tools.select.phases import OpenExecutor, phases
from bilevel.tools.select.work import Work


def command(
    arguments: Sequence[str], prog: str, load_task: Callable[[str], Task], open_executor: OpenExecutor
) -> tuple[Callable[[], None], Config, Path]:
    """Understand a command line, without running it.

    Returns what runs it, its settings, and the directory that it writes to; a UserError says which flags contradict each other.
    """
    import tyro

    config = tyro.cli(Config, args=list(arguments), prog=prog)
    config.check()
    return lambda: select(config, load_task, open_executor), config, config.output


def select(config: Config, load_task: Callable[[str], Task], open_executor: OpenExecutor) -> None:
    """Score all files, choose, and write what is kept: in this process, or by the tasks of an executor."""
    run_phases = None if config.executor is None else open_executor(config)
    work = Work(config, load_task)
    work.prepare()
    if run_phases is not None:
        return run_phases(phases(config, load_task, len(work.parts)))
    work.score()
    choice = work.choose()
    work.write(choice)
    work.finish(choice)
