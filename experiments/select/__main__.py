"""Selects the documents of any corpus that a trained weighting network prefers.

    python -m experiments.language_modeling --method soba --run-dir runs/mine …
    python -m experiments.select --weights runs/mine/soba-seed0 --corpus "heap/*.jsonl.gz" --output selected \
      --keep-fraction 0.1

Two phases, each file by file: scores are written for every document; when those of all files are there, the threshold is
found, and what is kept is written. Nothing that is finished is done again.
"""

from __future__ import annotations

import sys

from bilevel.training.progress import Progress
from experiments import cli
from experiments.select import tables
from experiments.select.choice import choose
from experiments.select.config import Config
from experiments.select.corpus import Part, open_parts
from experiments.select.network import Network, load_network
from experiments.select.output import SELECTED, Selection
from experiments.select.scores import ScoreFiles

UNFINISHED = 3
"""Exit code of a process that has scored its files while those of other shards are not scored yet."""


def main(config: Config) -> None:
    """Scores this process's files and, once all scores are there, writes what is kept of them."""
    config.check()
    network = load_network(config.weights)
    parts = open_parts(config)
    tables.make_folder(config.output, "--output")
    files = ScoreFiles(config, network, parts)
    settings = {"scores": files.settings, **config.choice_settings()}
    tables.check_settings(config.output, settings, "--output")
    own = parts[config.shard :: config.shards]
    _score(config, network, files, own)
    if missing := files.missing(config.wait):
        print(
            f"{len(missing)} of {len(parts)} files are not scored yet (the first is {missing[0].name}): when the other shards "
            "have scored them, give the same command again, or let it wait for them with --wait SECONDS.",
            file=sys.stderr,
        )
        sys.exit(UNFINISHED)
    choice = choose(config, files, parts)
    tables.write_settings(config.output, settings, "--output")
    selection = Selection(config, files, parts, choice)
    _write(config, selection, own)
    selection.write_summary()
    done = sum(selection.is_written(part) for part in parts)
    print(
        f"Kept {choice.kept:,} of {choice.documents:,} documents; {config.output / SELECTED}: {done} of {len(parts)} files."
    )


def _score(config: Config, network: Network, files: ScoreFiles, own: list[Part]) -> None:
    for i, part in enumerate(own, start=1):
        found = files.found(part)
        if found:
            continue
        if found is None:
            print(f"{part.name} changed after it was scored: scoring it again.", file=sys.stderr)
        with Progress(None, config.progress, f"scoring {i}/{len(own)} {part.name}", unit="document") as progress:
            files.score(part, network, config.batch_size, progress)


def _write(config: Config, selection: Selection, own: list[Part]) -> None:
    for i, part in enumerate(own, start=1):
        if not selection.is_written(part):
            with Progress(None, config.progress, f"writing {i}/{len(own)} {part.name}", unit="document") as progress:
                selection.write(part, progress)


if __name__ == "__main__":
    cli.run(Config, main)
