"""What online batch selection costs: operations, memory and time of its step over those of uniform training, at n_b/n_B = 0.1.

    python -m benchmarks.selection_cost [--no-time] [--json FILE]

The steps are those of the task image_classification on images of 32 × 32 pixels (of noise: no cost depends on the
pixels), with AdamW. Programs are compiled ahead of time and take turns within one process, as in `benchmarks.step_cost`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.step_cost import Program, show
from bilevel.data import ArrayDataset, LabelledData
from bilevel.devices import sharding
from bilevel.study import resolve
from bilevel.study.context import Setting
from bilevel.study.run import Run
from bilevel.tasks.classification import TASK, DataConfig, ModelConfig, Rows, prepared

SIDE, CLASSES, ROWS = 32, 10, 64
BIG = 10
"""n_B in multiples of n_b."""
TARGET = "target"


@dataclass(frozen=True)
class SelectionCostConfig:
    """What to measure."""

    pairs: str = "resnet18:target,resnet18:cnn,resnet18:cnn-small,cnn:target,cnn:cnn-small"
    """Target network and what scores (target: the target itself), comma-separated."""
    methods: str = "rho_loss"
    """Methods that score by a model, comma-separated: rho_loss, train_loss, gradient_norm, gradient_norm_is."""
    dtypes: str = "float32"
    """Types of the scoring forward pass, comma-separated: float32, bfloat16."""
    statistics: str = "batch,running"
    """What BatchNorm normalises the scored rows by, comma-separated."""
    batch_size: int = 32
    """n_b."""
    time: bool = True
    """Run the programs; otherwise only compile and count."""
    repeats: int = 3
    """Turns of each program; the median counts."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    target: str
    scorer: str
    method: str
    dtype: Any
    statistics: Any


def noise_images() -> Rows:
    """A few random images as all sets."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS, SIDE, SIDE, 3)).astype(np.uint8)
    rows = ArrayDataset({"image": images, "label": (np.arange(ROWS) % CLASSES).astype(np.int32)})
    return prepared(DataConfig(), LabelledData("noise", rows, rows, rows, rows, CLASSES, (), ""))


def compiled(setting: Setting, method: str, timed: bool) -> Program:
    """The step of a method on one device, as a comparison builds it."""
    study, plan = setting.config.study, Run(setting.context(method, 0)).plan
    create = partial(plan.init, jax.random.key(0), jax.random.key(2), jax.random.key(1))

    def batch(rows: int) -> Any:
        return jax.tree.map(jnp.asarray, setting.splits.train.rows(np.arange(rows) % ROWS))

    big, specific = batch(study.big_batch_size if plan.picks else study.batch_size), batch(study.batch_size)
    program = jax.jit(plan.step.step, donate_argnums=0).lower(jax.eval_shape(create), big, specific).compile()
    return Program(program, lambda: (None, big, specific), jax.jit(create)() if timed else None)


def cases(config: SelectionCostConfig) -> Iterator[Case]:
    """The lines asked for; networks without BatchNorm (and so without --statistics) once."""
    for pair in config.pairs.split(","):
        target, scorer = pair.split(":")
        scoring = target if scorer == TARGET else scorer
        kinds = config.statistics.split(",") if scoring.startswith(("resnet", "wrn", "vgg")) else ["batch"]
        for method in config.methods.split(","):
            for dtype in config.dtypes.split(","):
                yield from (Case(target, scorer, method, dtype, kind) for kind in kinds)


def measured(config: SelectionCostConfig) -> list[dict[str, Any]]:
    """Compiles everything, takes turns, and makes the rows of the table."""
    base = resolve.default_config(TASK)
    base = base.with_study(batch_size=config.batch_size, big_batch_size=BIG * config.batch_size)
    setting = Setting(base, TASK, noise_images(), sharding.make_mesh(jax.devices()[:1]))
    wanted, uniform, selecting = list(cases(config)), {}, {}
    for case in wanted:
        network = dataclasses.replace(base, task=dataclasses.replace(base.task, model=ModelConfig(case.target)))
        if case.target not in uniform:
            uniform[case.target] = compiled(setting.of(network), "uniform", config.time)
        proxy = None if case.scorer == TARGET else case.scorer
        scoring = {"network": proxy, "dtype": case.dtype, "statistics": case.statistics}
        own = dataclasses.replace(base.methods[case.method], **scoring)
        selecting[case] = compiled(setting.of(network.with_method(case.method, own)), case.method, config.time)
    if config.time:
        for turn in range(config.repeats + 1):
            for program in (*uniform.values(), *selecting.values()):
                program.turn()
                if turn == 0:
                    program.seconds.clear()  # warming up
    return [_row(case, selecting[case], uniform[case.target]) for case in wanted]


def _row(case: Case, program: Program, plain: Program) -> dict[str, Any]:
    return {
        **dataclasses.asdict(case),
        "flops_ratio": program.flops / plain.flops,
        "temp_ratio": program.temp_bytes / plain.temp_bytes,
        "seconds_ratio": program.median / plain.median,
        "plain_seconds": plain.median,
        "plain_flops": plain.flops,
    }


COLUMNS = {
    "target": "target", "scorer": "scored by", "method": "method", "dtype": "scoring in", "statistics": "BatchNorm by",
    "flops_ratio": "operations", "temp_ratio": "memory", "seconds_ratio": "seconds",
}  # fmt: skip


def main(config: SelectionCostConfig) -> None:
    """Measures and prints the table: ratios to the uniform step of the target."""
    show(measured(config), COLUMNS, config.json)


if __name__ == "__main__":
    main(tyro.cli(SelectionCostConfig))
