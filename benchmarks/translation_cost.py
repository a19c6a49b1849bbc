"""What translation models cost: time and memory of a gradient and of a beam search, over those of a forward pass on as many rows.

    python -m benchmarks.translation_cost [--models xs,small,recurrent] [--rows 32] [--json FILE]

Programs are compiled ahead of time and take turns within one process, as in `benchmarks.step_cost`. Pieces are random and
parameters untrained, so that hardly any hypothesis ends and searches go on to the last piece.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.step_cost import Program, show
from bilevel.nn.translation.base import EncoderDecoder
from bilevel.nn.translation.beam_search import beam_search
from bilevel.nn.translation.losses import translation_loss
from bilevel.nn.translation.recurrent import RecurrentConfig, recurrent
from bilevel.nn.translation.transformer import SIZES, TranslatorConfig, transformer


@dataclass(frozen=True)
class TranslationCostConfig:
    """What to measure."""

    models: str = "xs,recurrent"
    """Sizes of the transformer (xs, small, base, big) or `recurrent` (hidden 256), comma-separated."""
    rows: int = 32
    """b, of every program."""
    pieces: int = 32
    """Pieces of a source and of a target, and the most that a search may find."""
    vocabulary: int = 2000
    beam: int = 4
    dropout: float = 0.1
    smoothing: float = 0.1
    repeats: int = 5
    """Turns of each program; the median counts."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


def model(name: str, c: TranslationCostConfig) -> EncoderDecoder:
    """Build one of the models."""
    if name == "recurrent":
        return recurrent(RecurrentConfig(c.vocabulary, c.vocabulary, hidden=256, embedding=128, dropout=c.dropout))
    return transformer(replace(TranslatorConfig(c.vocabulary, dropout=c.dropout), **SIZES[name]))


def programs(name: str, c: TranslationCostConfig) -> dict[str, Program]:
    """Compile the forward pass, the gradient and the search of a model."""
    rng, network = np.random.default_rng(0), model(name, c)
    length = jnp.asarray(rng.integers(c.pieces // 4, c.pieces + 1, c.rows), jnp.int32)
    sides = {k: jnp.asarray(rng.integers(3, c.vocabulary, (c.rows, c.pieces)), jnp.int32) for k in ("source", "target")}
    batch = {**sides, "source_length": length, "target_length": length}
    rows = translation_loss(network, train=True, smoothing=c.smoothing)

    def loss(params: Any) -> Any:
        return rows(params, {}, batch, jax.random.key(0))[0].mean()

    def search(params: Any) -> Any:
        return beam_search(network, params, batch, beam=c.beam, most=c.pieces)

    params = network.init(jax.random.key(1), batch)
    kinds = {"forward": loss, "gradient": jax.value_and_grad(loss), f"search, beam {c.beam}": search}
    return {k: Program(jax.jit(f).lower(params).compile(), lambda: (params,)) for k, f in kinds.items()}


def measured(c: TranslationCostConfig) -> list[dict[str, Any]]:
    """Compile everything, take turns, and make the rows of the table."""
    every = {name: programs(name, c) for name in c.models.split(",")}
    for turn in range(c.repeats + 1):
        for program in (program for each in every.values() for program in each.values()):
            program.turn()
            if turn == 0:
                program.seconds.clear()  # warming up
    return [
        {
            "model": name,
            "program": kind,
            "seconds_ratio": program.median / each["forward"].median,
            "seconds": program.median,
            "megabytes": program.temp_bytes / 1e6,
        }
        for name, each in every.items()
        for kind, program in each.items()
    ]


COLUMNS = {
    "model": "model", "program": "program", "seconds_ratio": "over a forward pass", "seconds": "seconds",
    "megabytes": "temporary memory, MB",
}  # fmt: skip


def main(config: TranslationCostConfig) -> None:
    """Measure and print the table."""
    show(measured(config), COLUMNS, config.json)


if __name__ == "__main__":
    main(tyro.cli(TranslationCostConfig))
