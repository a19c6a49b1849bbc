"""Operations of a step of `bilevel compare`, by XLA's counts: compiled for the flags of a command, not run, and without its data.

    python -m benchmarks.command_cost language_modeling --preset atd --compare uniform,soba,dds
    python -m benchmarks.command_cost image_classification --model.network wrn28-2 --batch-size 128 --compare uniform,dds

The average is over the steps of a period (α is not learned on every step, nor are specific rows evaluated on every one), the
ratio over the first method's. Images are of 32 × 32 × 3 pixels and 10 classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.selection_cost import noise_images
from benchmarks.step_cost import show
from bilevel import cli
from bilevel.data import ArrayDataset
from bilevel.devices import sharding
from bilevel.study import Splits, registry
from bilevel.study.context import Setting
from bilevel.study.run import Run
from bilevel.tasks.language_modeling import TextSplits

ROWS = 1 << 15
"""Rows of the training set: more than any big batch."""
COLUMNS = {"method": "method", "flops": "operations of a step", "ratio": "over the first"}


def rows_of_text(length: int) -> Splits:
    """Empty rows as all sets."""
    rows = ArrayDataset({"tokens": np.zeros((ROWS, length), np.uint8), "length": np.full(ROWS, length, np.int32)})
    sets = {"specific": rows}
    return TextSplits(train=rows, specific=rows, valid=sets, test=sets, held_out=rows, tokenizer=None, started={})


def operations(setting: Setting, method: str) -> float:
    """Operations of a step, on average over a period."""
    study, plan = setting.config.study, Run(setting.context(method, 0)).plan
    state = jax.eval_shape(partial(plan.init, *jax.random.split(jax.random.key(0), 3)))
    row = setting.splits.train.rows(np.arange(1))

    def batch(count: int) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), jnp.asarray(x).dtype), row)

    specific = plan.specific_batch_size or study.batch_size
    batches = batch(study.big_batch_size if plan.picks else study.batch_size), batch(specific)
    kinds = [plan.step.at(i) for i in range(plan.step.period)]
    counted = {kind: _flops(jax.jit(kind).lower(state, *batches).compile()) for kind in dict.fromkeys(kinds)}
    return sum(counted[kind] for kind in kinds) / len(kinds)


def _flops(program: Any) -> float:
    return float(program.cost_analysis()["flops"])


def main(arguments: Sequence[str]) -> None:
    """Counts and prints the table."""
    command = cli.parse(["compare", *arguments])
    config, task = command.settings, cli.load_task(arguments[0])
    splits = noise_images() if arguments[0] == "image_classification" else rows_of_text(config.task.data.length)
    setting = Setting(config, task, splits, sharding.make_mesh(jax.devices()[:1]))
    found = [(name, operations(setting, name)) for name in registry.chosen(config.study.compare, splits)]
    show([{"method": name, "flops": f"{x:.3g}", "ratio": x / found[0][1]} for name, x in found], COLUMNS, None)


if __name__ == "__main__":
    main(sys.argv[1:])
