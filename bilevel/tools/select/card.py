"""The card beside exported weights: what they are, and where they are from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bilevel.data.text.lines import lines_of
from bilevel.data.text.parts import Part
from bilevel.data.text.saved import INFO, read_json_file
from bilevel.files import appearing
from bilevel.study.context import RESULT
from bilevel.tools.select.config import Config
from bilevel.training.run_dir import read_json, read_settings
from bilevel.training.settings import flag_of
from bilevel.types import UserError

CARD = "README.md"
_LICENCE = re.compile(r"(LICEN[SC]E|COPYING)(\.(txt|md))?", re.IGNORECASE)
_NOT_SHOWN = ("output", "scores", "executor", "tasks", "workers", "slurm", "progress", "batch_size")
"""Flags that decide nothing about the weights, or where they are written."""


def write_card(config: Config, parts: list[Part], summary: Mapping[str, Any]) -> None:
    """Write README.md: target data, corpus, licence where it is known, metrics of the run, and the command."""
    text = "\n".join(_lines(config, parts, summary)) + "\n"
    with appearing(config.output / CARD) as file:
        file.write_text(text, encoding="utf-8")


def _lines(config: Config, parts: list[Part], summary: Mapping[str, Any]) -> Iterator[str]:
    settings = read_settings(config.weights)
    data = settings.get("data") or {}
    yield "# Weighted documents"
    yield ""
    yield (
        f"The records of a corpus with one more field, `{config.weight_field}`: exp(score / {config.temperature:g}), divided by "
        "its mean over the kept documents. Scores are those of a weighting network that the method "
        f"`{settings.get('method')}` of bilevel learned so that a model trained on the weighted corpus is good on the target "
        "data."
    )
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    yield f"| target data | {_cell(data.get('specific', 'not known'))} |"
    yield f"| learned on | {_cell(data.get('generic', 'not known'))} |"
    yield f"| corpus | {_cell(config.corpus)}: {len(parts)} files, {summary['documents']:,} documents |"
    yield f"| kept | {summary['kept']:,} documents, those with a score of at least {summary['threshold']:.6g} |"
    yield f"| effective sample size of the weights | {summary['effective_sample_size']:,.1f} documents |"
    yield f"| licence of the corpus | {_cell('; '.join(licences(parts)) or 'not known: see where it is from')} |"
    metrics = read_json(config.weights / RESULT) if (config.weights / RESULT).exists() else {}
    for name, value in metrics.items():
        if isinstance(value, float) and "loss" in name:
            yield f"| {name.replace('_', ' ')} of the run | {value:.4f} |"
    yield ""
    yield "```sh"
    yield _command(config)
    yield "```"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _command(config: Config) -> str:
    given: list[str] = ["bilevel", "select"]
    default = Config(Path(), "", Path())
    for name, value in vars(config).items():
        if name not in _NOT_SHOWN and value != getattr(default, name):
            given += [flag_of(name), str(value)]
    return shlex.join([*given, "--output", str(config.output)])


def licences(parts: list[Part]) -> list[str]:
    """Return what the folders of a corpus say of its licence: dataset_info.json, or the first line of a file LICENSE."""
    found: dict[str, None] = {}
    for folder in dict.fromkeys(path.parent for part in parts for path in part.source.paths if isinstance(path, Path)):
        if (folder / INFO).exists() and (said := read_json_file(folder / INFO).get("license")):
            found[str(said)] = None
        for file in sorted(folder.iterdir()):
            if file.is_file() and _LICENCE.fullmatch(file.name):
                found[_first_line(file)] = None
    return list(found)


def _first_line(file: Path) -> str:
    """The first line of a licence that is not blank, and the name of the file; the name alone if it is no text."""
    try:
        line = next((line.strip() for line in lines_of(file) if line.strip()), "")
    except UserError:
        line = ""
    return f"{line} ({file.name})" if line else file.name
