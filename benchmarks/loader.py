"""What the data and the loop cost: the loader alone, waiting for it, and the loop around the compiled step.

    python -m benchmarks.loader [--json FILE] [--generic heap.txt.gz]

Prints Markdown tables. Seconds are wall-clock; what is compared is measured in turns in one process.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from bilevel.data import Loader
from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.step.train_step import TrainStep
from bilevel.study import resolve
from bilevel.study.context import Setting
from bilevel.study.feeding import loaders
from bilevel.study.run import Run
from bilevel.study.suite import opened
from bilevel.tasks.language_modeling import TASK, DataConfig, LanguageConfig, ModelConfig
from bilevel.training import Data, LoopConfig, Resident, train
from bilevel.training.feed import Source, feed
from bilevel.training.interval import Interval
from bilevel.training.loop import STEPS_AHEAD
from bilevel.types import Batch

Size: TypeAlias = Literal["xs", "small", "medium", "large"]
Row: TypeAlias = dict[str, Any]
_COPIED = 1 << 28  # bytes: more than any cache holds


@dataclass(frozen=True)
class LoaderConfig:
    """What is measured."""

    generic: str = "python:stdlib"
    """Generic data, as --data.generic of the task."""
    specific: str = "python:topics"
    """Specific data, as --data.specific of the task."""
    cache_dir: Path = Path("~/.cache/bilevel")
    """Where packed data is kept."""
    parts: tuple[Literal["loader", "stalls", "overhead"], ...] = ("loader", "stalls", "overhead")
    """What to measure."""
    sizes: tuple[Size, ...] = ("xs", "small")
    """Main models of the part "stalls"."""
    overhead_size: Size = "small"
    """Main model of the part "overhead"."""
    steps: int = 48
    """Steps of one measurement; a multiple of 8."""
    repeats: int = 5
    """Measurements of each kind."""
    json: Path | None = None
    """Also write all rows to this file."""


def main(options: LoaderConfig) -> None:
    """Measures and prints."""
    found: dict[str, list[Row]] = {}
    for name, part in (("loader", loader_rows), ("stalls", stall_rows), ("overhead", overhead_rows)):
        if name in options.parts:
            found[name] = []
            for row in part(options):
                _show(row, heading=not found[name])
                found[name].append(row)
            print(flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _show(row: Row, heading: bool) -> None:
    """Prints a line of a Markdown table."""
    lines = [list(row), ["---"] * len(row)] if heading else []
    lines.append([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def loader_rows(options: LoaderConfig) -> Iterator[Row]:
    """Rows and bytes a second of `Loader.batch`, and its share of a plain copy's bytes a second."""
    copy = _copy_seconds(3 * options.repeats)
    for length in (64, 128):
        train_rows = _setting(options, length=length).splits.train
        for size in (256, 1024, 4096, 16384):
            loader = Loader(train_rows, min(size, len(train_rows)), seed=0)
            batch = loader.batch(0)
            count = max(2, 2**16 // size)
            seconds = _best(options, count, loader.batch)
            row_bytes = sum(x.nbytes for x in batch.values()) / loader.batch_size
            rate = loader.batch_size / seconds
            yield {
                "T": length, "B": loader.batch_size, "rows in the data": len(train_rows),
                "ms a batch": seconds * 1e3, "of it the order": _best(options, count, loader.indices) / seconds,
                "million rows/s": rate / 1e6, "GB/s": rate * row_bytes / 1e9, "copying GB/s": _COPIED / copy / 1e9,
                "share of copying": rate * row_bytes * copy / _COPIED,
            }  # fmt: skip


def _copy_seconds(repeats: int) -> float:
    source, target = np.ones(_COPIED, np.uint8), np.zeros(_COPIED, np.uint8)
    return min(_seconds(lambda: np.copyto(target, source)) for _ in range(repeats))


def _best(options: LoaderConfig, count: int, call: Callable[[int], object]) -> float:
    """The least mean seconds of `count` consecutive calls."""

    def calls(start: int) -> None:
        for step in range(start, start + count):
            call(step)

    return min(_seconds(lambda k=k: calls(k * count)) for k in range(options.repeats)) / count


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Parts(NamedTuple):
    """What trains one model."""

    step: TrainStep
    loaders: tuple[Loader, Loader]
    start: Callable[[], TrainState]


class Jitted:
    """A step whose functions are jitted once, for all measurements."""

    def __init__(self, step: TrainStep):
        self.period = step.period
        self._step = step
        self._jitted = {kind: jax.jit(kind, donate_argnums=0) for kind in (step.plain, step.learn, step.reuse)}

    def at(self, step: int, /) -> Any:
        """As `TrainStep.at`."""
        return self._jitted[self._step.at(step)]


def _setting(options: LoaderConfig, size: Size = "xs", length: int = 64, big_batch_size: int = 512) -> Setting:
    data = DataConfig(generic=options.generic, specific=options.specific, cache_dir=options.cache_dir, length=length)
    config = resolve.default_config(TASK).with_study(big_batch_size=big_batch_size)
    config = dataclasses.replace(config, task=LanguageConfig(data, ModelConfig(network=size)))
    return dataclasses.replace(opened(config, TASK), mesh=sharding.make_mesh(jax.devices()[:1]))


def _parts(setting: Setting) -> Parts:
    context = setting.context("soba", 0)
    plan = Run(context).plan
    generic, specific = loaders(context, plan)
    assert isinstance(plan.step, TrainStep)
    assert isinstance(generic, Loader)
    assert isinstance(specific, Loader)
    create = partial(plan.init, jax.random.key(0), jax.random.key(2), jax.random.key(1))
    return Parts(plan.step, (generic, specific), jax.jit(create))


def stall_rows(options: LoaderConfig) -> Iterator[Row]:
    """How long the loop waits for batches."""
    for size in options.sizes:
        for big in (512, 2048):
            parts = _parts(_setting(options, size, big_batch_size=big))
            step, data = Jitted(parts.step), Data(*parts.loaders)
            waits = [_waiting(data, step, parts.start(), options.steps) for _ in range(options.repeats)]
            seconds, waited, idle = np.median(np.asarray(waits), axis=0)
            yield {
                "size": size, "b": 16, "B": big, "ms a step": seconds * 1e3,
                "waiting": f"{waited:.2%}", "waiting with an idle device": f"{idle:.2%}",
            }  # fmt: skip


def _waiting(data: Source, step: Jitted, state: TrainState, steps: int) -> tuple[float, float, float]:
    """Seconds a step, and the shares of the time spent waiting for items: in all, and when the device has nothing to do."""
    interval, programs = Interval(True), data.programs(step, 1)
    warm = 2 * step.period
    began = waited = idle = 0.0
    with feed(data, LoopConfig(warm + steps).calls(0)) as items:
        for made in range(warm + steps):
            if made == warm:
                jax.block_until_ready(state)
                began, waited, idle = time.perf_counter(), 0.0, 0.0
            before = time.perf_counter()
            number, item = next(items)
            wait = time.perf_counter() - before
            waited += wait
            step_array: Any = state.step
            idle += wait if step_array.is_ready() else 0.0
            program, _ = programs.at(number)
            state, metrics = program(state, *item.arguments)
            interval.add(number + 1, metrics)
            interval.bound(STEPS_AHEAD)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    return seconds / steps, waited / seconds, idle / seconds


def overhead_rows(options: LoaderConfig) -> Iterator[Row]:
    """Seconds of `train` over those of calling its programs again and again on the same arrays.

    Wall-clock, and processor seconds of all threads: on a busy machine the second say more.
    """
    parts = _parts(_setting(options, options.overhead_size))
    nothing = parts.step._replace(learn=_nothing, plain=_nothing)
    sources = ((Data(*parts.loaders), 1), (Resident(*parts.loaders), 8))
    for size, step in (("no computation", nothing), (options.overhead_size, parts.step)):
        for source, most in sources:
            chosen = Jitted(step)
            for measure in (_calling, _training):  # compiles
                measure(source, chosen, most, parts.start(), 16)
            found = []
            for _ in range(options.repeats):
                before, trained, after = (
                    measure(source, chosen, most, parts.start(), options.steps)
                    for measure in (_calling, _training, _calling)
                )
                found.append([((a + b) / 2, c) for a, b, c in zip(before, after, trained, strict=True)])
            (called, trained), (called_cpu, trained_cpu) = np.median(found, axis=0)
            ratios = np.asarray([[trained / called - 1 for called, trained in pair] for pair in found])
            middle, least, most_of_all = np.median(ratios, axis=0), ratios.min(axis=0), ratios.max(axis=0)
            yield {
                "size": size, "data": "resident" if most > 1 else "streaming", "steps a call": most,
                "ms a step, calling": called * 1e3, "ms a step, train()": trained * 1e3,
                "overhead (least to most)": f"{middle[0]:.1%} ({least[0]:.1%} to {most_of_all[0]:.1%})",
                "CPU ms, calling": called_cpu * 1e3, "CPU ms, train()": trained_cpu * 1e3,
                "CPU overhead (least to most)": f"{middle[1]:.1%} ({least[1]:.1%} to {most_of_all[1]:.1%})",
            }  # fmt: skip


def _nothing(state: TrainState, big_batch: Batch, specific_batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """A step with the metrics of a real one, but without work."""
    names = ("specific_loss", "effective_sample_size", "weight_entropy", "largest_weight", "alignment_rms")
    metrics = dict.fromkeys(names, jnp.zeros(()))
    loss = big_batch["tokens"][0, 0].astype(jnp.float32)
    metrics |= {"generic_loss": loss, "ids": big_batch["id"][:16]}
    return dataclasses.replace(state, step=state.step + 1), metrics


def _calling(source: Source, step: Any, most: int, state: TrainState, steps: int) -> tuple[float, float]:
    """Seconds and processor seconds a step of the programs alone, on the arrays of the first 8 steps.

    The first call of each program does not count in the seconds, as in `train`.
    """
    programs = source.programs(step, most)
    calls = list(LoopConfig(8, log_every=8, steps_per_call=most).calls(0))
    turns = [(programs.at(first)[0], source.item(first, count, most)) for first, count in calls]
    jax.block_until_ready(state)
    cpu, began, first_calls = time.process_time(), 0.0, 2 // most or 1
    for made in range(steps // most):
        if made == first_calls:
            jax.block_until_ready(state)
            began = time.perf_counter()
        program, item = turns[made % len(turns)]
        state, _ = program(state, *item.arguments)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    return seconds / (steps - first_calls * most), (time.process_time() - cpu) / steps


def _training(source: Source, step: Any, most: int, state: TrainState, steps: int) -> tuple[float, float]:
    """The same of the whole loop with a row of metrics."""
    config = LoopConfig(
        steps, log_every=steps, evaluate_every=0, checkpoint_every=0, steps_per_call=most, progress=False
    )
    jax.block_until_ready(state)
    cpu = time.process_time()
    result = train(step, state, data=source, config=config, on_selected=lambda ids, done: {"rows": float(len(ids))})
    return result.seconds / (steps - (2 // most or 1) * most), (time.process_time() - cpu) / steps


if __name__ == "__main__":
    main(tyro.cli(LoaderConfig))
