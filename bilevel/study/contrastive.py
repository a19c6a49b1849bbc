"""Contrastive data selection: train on all generic rows, fine-tune, keep the rows that this helps most, train on those.

The four phases of Grangier, Ablin and Hannun, section 2. Scores are computed once for a run, and kept as a table by row number
that knows the generic and the specific data it is of; `SECONDS` in its settings is what they cost.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from bilevel.data import Dataset, RowView, digest
from bilevel.devices import sharding
from bilevel.offline.contrastive import LossTable, highest_fraction, load_gains, score_gains
from bilevel.study import files
from bilevel.study.context import Context, local
from bilevel.study.finetune import Finetuning, remove
from bilevel.study.spec import Switch
from bilevel.study.task import ModelOptions
from bilevel.types import UserError

NAME = "contrastive_scores.safetensors"
FOLDER = "contrastive_finetuned"
SECONDS = "seconds"
"""That fine-tuning and scoring took, without compiling, evaluating and saving."""
DIGEST = "scores_digest"
_SCORED_AT_ONCE = 256


def switch(s: Any, context: Context) -> tuple[Switch, dict[str, str]]:
    """Return when rows are chosen and how, and what identifies scores that come from another run.

    Args:
      s: `bilevel.study.methods.plain.Contrastive`.
      context: of the run.

    Raises:
      UserError: for shares that leave no step or no batch, or scores of other data.
    """
    _check(s, context)
    first, file = _first_steps(s, context), s.scores or context.directory / NAME

    def rows(state: Any) -> tuple[Dataset, dict[str, float]]:
        scores = _load(file, context) if file.exists() else _scored(s, context, state, file)
        found = highest_fraction(scores, s.fraction)
        report = {"preparation_seconds": scores.settings.get(SECONDS, 0.0), "preparation_step": float(first)}
        return RowView(_whole(context.splits.train), found), report

    return Switch(first, rows, file.exists), {} if s.scores is None else {DIGEST: _digest(s, context)}


def _first_steps(s: Any, context: Context) -> int:
    first, steps = round(s.start * context.study.steps), context.study.steps
    if not 0 < first < steps:
        raise UserError(
            f"--contrastive.start {s.start} leaves {first} of {steps} steps before selection: choose a share that leaves at "
            "least one step before it and one after."
        )
    return first


def _check(s: Any, context: Context) -> None:
    scored = len(context.splits.train)
    if not 0 < s.fraction <= 1:
        raise UserError(f"--contrastive.fraction {s.fraction} must lie in (0, 1].")
    if s.rows < 0 or s.finetune_steps < 1:
        raise UserError(
            f"--contrastive.rows {s.rows} must be at least 0, and --contrastive.finetune-steps {s.finetune_steps} at least 1."
        )
    if s.scores is not None and DIGEST not in context.recorded("contrastive"):
        scored = int(np.isfinite(_load(s.scores, context).losses).sum())
    elif s.rows:
        scored = min(s.rows, scored)
    size = context.study.batch_size
    if round(s.fraction * scored) < size:
        raise UserError(
            f"--contrastive.fraction {s.fraction} of {scored} scored rows keeps fewer than the --batch-size {size}: keep a "
            "larger share, or score more rows."
        )


def _scored(s: Any, context: Context, state: Any, file: Path) -> LossTable:
    """Phases (ii) and (iii): fine-tunes the pre-trained parameters, and scores generic training rows by both.

    Returns:
      Loss before minus loss after fine-tuning by row number, float32 `[N]`; NaN where a row was not scored.

    Raises:
      Stopped: a signal stopped phase (ii).
    """
    model, clock = context.model(ModelOptions()), _Clock()
    before = sharding.whole(context.mesh, (state.params, state.model_state))
    folder = context.directory / FOLDER
    finetuning = Finetuning(context, model)
    after = finetuning(before, s.finetune_steps, folder)
    everything = np.arange(len(context.splits.train))
    count = min(s.rows or len(everything), len(everything))
    rng = np.random.default_rng([context.seed, 5_000_003])
    rows = everything if count == len(everything) else np.sort(rng.choice(everything, count, replace=False))
    first, second = (jax.tree.map(local, each) for each in (before, (after.params, after.model_state)))
    scores = score_gains(
        model.evaluation, first, second, RowView(context.splits.train, rows), context.splits.specific,
        batch_size=_SCORED_AT_ONCE, settings={"finetune_steps": s.finetune_steps, "seed": context.seed}, on_batch=clock,
    )  # fmt: skip
    scores = dataclasses.replace(scores, settings={**scores.settings, SECONDS: after.seconds + clock.seconds})
    if jax.process_index() == 0:
        scores.save(file)
    remove(folder)
    return scores


def _load(path: Path, context: Context) -> LossTable:
    if not path.exists():
        raise UserError(f"There are no scores at {path}: give --contrastive.scores the {NAME} of a run of contrastive.")
    return load_gains(path, context.splits.train, context.splits.specific)


def _digest(s: Any, context: Context) -> str:
    """What tells scores of another run from others, wherever they lie; what was recorded stands if they are gone."""
    before = files.recorded(context.directory).get("contrastive", {})
    if DIGEST in before and not s.scores.exists():
        return before[DIGEST]
    return digest([_load(s.scores, context).losses.tobytes()])


def _whole(dataset: Dataset) -> Dataset:
    """What the ids of a data set's rows count: the whole that it is a view of."""
    while isinstance(dataset, RowView):
        dataset = dataset.dataset
    return dataset


class _Clock:
    """Estimates the seconds of scoring from all batches but the first, which compiles."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, count: int) -> None:
        now = perf_counter()
        if self._first is None:
            self._first = done, now
        else:
            rows, began = self._first
            self.seconds = (now - began) * done / max(done - rows, 1)
