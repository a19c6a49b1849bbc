"""Selects the documents of any corpus that a trained weighting network prefers.

Two phases, each file by file: scores are written for every document; when those of all files are there, the threshold is
found, and what is kept is written. Nothing that is finished is done again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bilevel.data import given_by
from bilevel.data.text.parts import open_parts
from bilevel.devices.processes import say
from bilevel.study.task import Task
from bilevel.tools.select.config import Config
from bilevel.tools.select.network import load_network
from bilevel.tools.select.output import SELECTED, Selection
from bilevel.tools.select.scores import ScoreFiles
from bilevel.tools.select.written import check_fields
from bilevel.training.progress import Progress
from bilevel.training.signals import STOPPED


def command(
    arguments: Sequence[str], prog: str, load_task: Callable[[str], Task]
) -> tuple[Callable[[], None], Config, Path]:
    """Understand a command line, without running it.

    Returns what runs it, its settings, and the directory that it writes to; a UserError says which flags contradict each other.
    """
    import tyro

    config = tyro.cli(Config, args=list(arguments), prog=prog)
    config.check()
    return lambda: select(config, load_task), config, config.output


def select(config: Config, load_task: Callable[[str], Task]) -> None:
    """Score this process's files and, once all scores are there, write what is kept of them; exit if others are missing."""
    network = load_network(config.weights, config.task, load_task, config.at)
    with given_by("--corpus"):
        parts = open_parts(config.corpus, field=config.field, documents=config.documents)
    for part in parts[config.shard :: config.shards]:
        check_fields(part, config)
    files = ScoreFiles(config, network, parts)
    shown = partial(Progress, None, config.progress, unit="document")
    own = list(enumerate(parts[config.shard :: config.shards], start=1))
    for i, part in own:
        if not files.found(part):
            if files.file(part).exists():
                say(f"{part.source.name} changed after it was scored, or its scores are damaged: scoring it again.")
            with shown(f"scoring {i}/{len(own)} {part.source.name}") as progress:
                files.score(part, progress)
    stop, missing = time.monotonic() + config.wait, parts
    while missing := [part for part in missing if not files.found(part, exact=False)]:
        if time.monotonic() >= stop:
            say(
                f"{len(missing)} of {len(parts)} files are not scored yet (the first is {missing[0].source.name}): when the "
                "other shards have scored them, give the same command again, or let it wait for them with --wait SECONDS."
            )
            sys.exit(STOPPED)
        time.sleep(0.5)
    selection = Selection(config, files, parts)
    for i, part in own:
        if not selection.is_written(part):
            with shown(f"writing {i}/{len(own)} {part.source.name}") as progress:
                selection.write(part, progress)
    kept, documents = selection.write_summary()
    done = sum(map(selection.is_written, parts))
    print(f"Kept {kept:,} of {documents:,} documents; {config.output / SELECTED}: {done} of {len(parts)} files.")
