"""What a method costs: operations, memory and time of its step over those of a plain training step.

    python -m benchmarks.step_cost [--sizes small,medium] [--json FILE]     # operations, memory and time
    python -m benchmarks.step_cost --sizes large --no-time                  # compiled, not run

Every program is compiled ahead of time and all programs of a size take turns within one process, so that the ratios do not
depend on how busy the machine is. The text is that of Python's standard library, packed as for training.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevel
from bilevel.data import Loader, open_source, pack
from bilevel.devices.axis import ALONE
from bilevel.devices.environment import keep_memory
from bilevel.methods import Method
from bilevel.nn.transformer import SIZES, Transformer, language_model_loss, last_blocks
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn
from bilevel.selection import filters, picking
from bilevel.types import Batch, LogitFn


class Variant(NamedTuple):
    """What is compared."""

    method: str
    derivatives: str
    blocks: int


class Shape(NamedTuple):
    """Batch of one size."""

    length: int
    rows: int


SHAPES = {"xs": Shape(64, 16), "small": Shape(128, 16), "medium": Shape(256, 8), "large": Shape(256, 16)}
"""Bytes in a row, and b."""

METHODS: dict[str, Callable[[], Method]] = {
    "dds": lambda: bilevel.dds(average_specific=0.9),
    "anograd": lambda: bilevel.anograd(average_specific=0.95, through_optimizer=True),
    "soba": lambda: bilevel.soba(optax.adam(2e-3, b2=0.98)),
}
"""As in the language-modelling experiment."""

MODES: dict[str, Any] = {"forward": bilevel.Forward(), "finite": bilevel.Finite()}


@dataclass(frozen=True)
class CostConfig:
    """What to measure."""

    sizes: str = "small"
    """Sizes of the main model, comma-separated: xs, small, medium, large."""
    methods: str = "dds,anograd,soba"
    """Methods, comma-separated."""
    derivatives: str = "forward,finite"
    """Ways of differentiating, comma-separated."""
    big_batches: str = "16,128"
    """B as multiples of b, comma-separated."""
    update_every: str = "1,2,1/2,4"
    """θ-updates for each α-update, comma-separated; 1/2: α at every step, specific rows at every second one (`probe_every`)."""
    probe_blocks: str = "0,1"
    """How many of the last blocks are probed, comma-separated; 0: all parameters."""
    weighting: str = "ngram"
    """Weighting network: ngram (the experiment's default), conv1 or conv2 (one and two convolutions of width 32 and 128)."""
    dtype: str = "float32"
    """Type of the main model's computation."""
    specific_rows: int = 0
    """Rows of the specific batch; 0: b."""
    time: bool = True
    """Run the programs; otherwise only compile and count."""
    repeats: int = 15
    """Turns of each program; the median counts."""
    generic: str = "python:stdlib"
    """Text of the batches; anything that the experiment's --data.generic takes."""
    cache_dir: Path = Path("~/.cache/bilevel")
    """Where packed text is kept."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


@dataclass
class Program:
    """One compiled step, and how long its turns took."""

    compiled: Any
    arguments: Callable[[], tuple[Any, ...]]
    state: Any = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """XLA's count of floating point operations."""
        return float(self.compiled.cost_analysis()["flops"])

    @property
    def bytes(self) -> float:
        """XLA's count of bytes read and written."""
        return float(self.compiled.cost_analysis()["bytes accessed"])

    @property
    def temp_bytes(self) -> int:
        """Peak memory beside arguments and results."""
        return int(self.compiled.memory_analysis().temp_size_in_bytes)

    @property
    def median(self) -> float:
        """Median seconds of a turn."""
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    def turn(self) -> None:
        """Runs once."""
        arguments = self.arguments()
        if self.state is not None:
            arguments = (self.state, *arguments[1:])
        began = time.perf_counter()
        result = jax.block_until_ready(self.compiled(*arguments))
        self.seconds.append(time.perf_counter() - began)
        if self.state is not None:
            self.state = result[0]


class Bench:
    """The programs of one size."""

    def __init__(self, config: CostConfig, size: str):
        self.config, self.size, self.shape = config, size, SHAPES[size]
        self.model = Transformer(dataclasses.replace(SIZES[size], dtype=jnp.dtype(config.dtype)))
        self.weighting = _weighting(config.weighting)
        self.source = pack(
            open_source(config.generic), length=self.shape.length, cache_dir=config.cache_dir.expanduser()
        )
        self.programs: dict[tuple[Any, ...], Program] = {}

    def batch(self, rows: int) -> Batch:
        """A batch of real text."""
        return jax.tree.map(jnp.asarray, Loader(self.source, rows, seed=0).batch(0))

    @functools.cached_property
    def logits(self) -> LogitFn:
        """The weighting network."""
        return logit_fn(self.weighting)

    def add(self, key: tuple[Any, ...], method: Method, rows: int, kind: str, **options: Any) -> None:
        """Compiles one kind of step ("plain", "learn" or "reuse") of a method, on a big batch of `rows`."""
        b = self.shape.rows
        logits = options.pop("logits", self.logits)
        train = bilevel.make_step(
            language_model_loss(self.model), logits, optax.adam(2e-3, b2=0.98), optax.adam(1e-2), method,
            batch_size=b, **options,
        )  # fmt: skip
        big, specific = self.batch(rows), self.batch(self.config.specific_rows or b)
        one = jax.tree.map(lambda x: x[:1], big)

        def init() -> Any:
            params = self.model.init(jax.random.key(0), one["tokens"])["params"]
            weights = {"scalar": jnp.zeros(())}
            if logits is self.logits:
                weights = self.weighting.init(jax.random.key(1), one["tokens"], one["length"])["params"]
            return train.init(jax.random.key(2), params, weights)

        compiled = jax.jit(getattr(train, kind), donate_argnums=0).lower(jax.eval_shape(init), big, specific).compile()
        state = jax.jit(init)() if self.config.time else None
        self.programs[key] = Program(compiled, lambda: (None, big, specific), state)

    def add_scoring(self, rows: int) -> None:
        """Compiles scoring and filtering alone."""
        big, rule = self.batch(rows), filters.gumbel_top_k()
        weights = self.weighting.init(jax.random.key(1), big["tokens"][:1], big["length"][:1])["params"]

        def run(weights: Any, big: Batch, key: Any) -> Any:
            scores = picking.score(self.logits, weights, big, rule, ALONE)
            return picking.pick(key, scores, big, self.shape.rows, rule, ALONE)

        key = jax.random.key(0)
        compiled = jax.jit(run).lower(weights, big, key).compile()
        self.programs["scoring", rows] = Program(compiled, lambda: (weights, big, key))

    def run(self) -> list[dict[str, Any]]:
        """Compiles everything, takes turns, and makes the rows of the table."""
        c, b = self.config, self.shape.rows
        multiples = [int(x) for x in c.big_batches.split(",")]
        self.add(("plain",), bilevel.uniform(), b, "plain")
        for multiple in multiples:
            self.add_scoring(multiple * b)
            self.add(("scored", multiple), bilevel.frozen(), multiple * b, "plain")
        for variant in self._variants():
            for kind in ("learn", "reuse") if self._reuses else ("learn",):
                self._add_variant(variant, kind, None)
                for multiple in multiples:
                    self._add_variant(variant, kind, multiple)
        if c.time:
            for turn in range(c.repeats + 2):
                for program in self.programs.values():
                    program.turn()
                    if turn < 2:
                        program.seconds.clear()  # warming up
        return [
            self.row(variant, multiple, period)
            for multiple in multiples
            for variant in self._variants()
            for period in self._periods
        ]

    def _add_variant(self, variant: Variant, kind: str, multiple: int | None) -> None:
        """With `multiple` None: without scoring."""
        options: dict[str, Any] = {"logits": _flat, "mode": "dense"}
        if multiple is not None:
            options = {"estimator": "score", "normalize_alignments": True}
        options |= {"update_every": 1, "probe_every": 2} if kind == "reuse" else {}
        options["param_filter"] = last_blocks(variant.blocks, self.model.config) if variant.blocks else None
        method, rows = METHODS[variant.method](), (multiple or 1) * self.shape.rows
        self.add((variant, kind, multiple), method, rows, kind, derivatives=MODES[variant.derivatives], **options)

    def _variants(self) -> Iterator[Variant]:
        c = self.config
        for parts in itertools.product(c.methods.split(","), c.derivatives.split(","), c.probe_blocks.split(",")):
            yield Variant(parts[0], parts[1], int(parts[2]))

    @property
    def _periods(self) -> list[tuple[int, int]]:
        pairs = (entry.split("/") for entry in self.config.update_every.split(","))
        return [(int(pair[0]), int(pair[-1])) for pair in pairs]

    @property
    def _reuses(self) -> bool:
        return any(probe > update for update, probe in self._periods)

    def row(self, variant: Variant, multiple: int, period: tuple[int, int]) -> dict[str, Any]:
        """One line of the table; averages are over the steps of a period."""
        p, (update, probe) = self.programs, period
        plain, scored, scoring = p["plain",], p["scored", multiple], p["scoring", multiple * self.shape.rows]
        learn, whole = p[variant, "learn", None], p[variant, "learn", multiple]

        def average(of: Callable[[Program], float], other: Program, multiple: int | None) -> float:
            total = of(p[variant, "learn", multiple]) + (probe - probe // update) * of(other)
            if probe > update:
                total += (probe // update - 1) * of(p[variant, "reuse", multiple])
            return total / probe / of(plain)

        return {
            "size": self.size,
            "big_batch_size": multiple * self.shape.rows,
            **variant._asdict(),
            "update_every": update,
            "probe_every": probe,
            "flops_ratio": average(lambda x: x.flops, plain, None),
            "bytes_ratio": average(lambda x: x.bytes, plain, None),
            "seconds_ratio": average(lambda x: x.median, plain, None),
            "scoring_seconds_ratio": scoring.median / plain.median,
            "total_seconds_ratio": average(lambda x: x.median, scored, multiple),
            "temp_bytes": learn.temp_bytes,
            "temp_ratio": learn.temp_bytes / plain.temp_bytes,
            "total_temp_bytes": whole.temp_bytes,
            "plain_seconds": plain.median,
            "plain_flops": plain.flops,
        }


def _flat(weight_params: Any, batch: Batch) -> Any:
    return weight_params["scalar"] * batch["length"].astype(jnp.float32)


def _weighting(name: str) -> Any:
    kinds = {
        "ngram": NGramWeighting(width=32, hidden=32),
        "conv1": ConvWeighting(layers=1, width=32),
        "conv2": ConvWeighting(layers=2, width=128),
    }
    return kinds[name]


COLUMNS = {
    "size": "size", "big_batch_size": "B", "method": "method", "derivatives": "derivatives", "blocks": "blocks",
    "update_every": "α every", "probe_every": "specific every",
    "flops_ratio": "operations", "bytes_ratio": "bytes", "temp_ratio": "memory", "seconds_ratio": "seconds",
    "scoring_seconds_ratio": "scoring, seconds", "total_seconds_ratio": "whole step, seconds",
}  # fmt: skip


def show(rows: list[dict[str, Any]], columns: dict[str, str], file: Path | None) -> None:
    """Prints a table (name of a number -> head of its column), and writes all numbers to the file."""
    print("| " + " | ".join(columns.values()) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        cells = (f"{row[k]:.2f}" if isinstance(row[k], float) else str(row[k]) for k in columns)
        print("| " + " | ".join(cells) + " |")
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")


def main(config: CostConfig) -> None:
    """Measures and prints the table: ratios to the plain step."""
    show([row for size in config.sizes.split(",") for row in Bench(config, size).run()], COLUMNS, config.json)


if __name__ == "__main__":
    keep_memory()  # as the commands do: without it the ratios are smaller
    main(tyro.cli(CostConfig))
