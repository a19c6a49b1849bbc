"""Processor time of `bilevel select` on plain text, on one core; with --fasttext in turns with a classifier of fastText.

    python -m benchmarks.select_speed --weights runs/my_domain/soba-seed0 --corpus corpus.txt [--fasttext model.bin]

The whole command counts, its start too, which is also measured alone, on one document. MB are 10⁶ bytes of the corpus.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

_SELECT = "import sys; from bilevel.cli import main; main(['select', *sys.argv[1:]])"
_FASTTEXT = """
import sys, fasttext
model, lines = fasttext.load_model(sys.argv[1]), open(sys.argv[2], encoding="utf-8").readlines()
for start in range(0, len(lines), 1000):
    model.f.multilinePredict(lines[start : start + 1000], 1, 0.0, "strict")
"""


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured."""

    weights: Path
    """Directory METHOD-seedN of a finished run."""
    corpus: Path
    """A file of plain text."""
    fasttext: Path | None = None
    """A classifier of fastText, whose package must be installed."""
    rounds: int = 3
    """How often each is measured, in turns."""


def main(config: SpeedConfig) -> None:
    """Print a Markdown table of medians."""
    size = config.corpus.stat().st_size / 1e6
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.txt"
        with config.corpus.open("rb") as file:
            first.write_bytes(file.readline())
        measured: dict[str, Callable[[], float]] = {
            "select": lambda: _select(config.weights, config.corpus),
            "select, its start alone": lambda: _select(config.weights, first),
        }
        if (model := config.fasttext) is not None:
            measured["fastText"] = lambda: _seconds(_FASTTEXT, str(model), str(config.corpus))
        _select(config.weights, config.corpus)  # its program is compiled and kept
        rounds = [{name: measure() for name, measure in measured.items()} for _ in range(config.rounds)]
    print("| | processor seconds | MB for each |\n| --- | --- | --- |")
    for name in measured:
        seconds = float(np.median([found[name] for found in rounds]))
        print(f"| {name} | {seconds:.2f} | {'' if 'alone' in name else f'{size / seconds:.1f}'} |")


def _select(weights: Path, corpus: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--weights", str(weights), "--corpus", str(corpus), "--output", f"{folder}/out", "--no-progress"]
        return _seconds(_SELECT, *flags, "--keep-fraction", "0.1")


def _seconds(code: str, *arguments: str) -> float:
    """Processor seconds of a Python program on one core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = min(os.sched_getaffinity(0))
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
