"""Contrastive data selection: train on all generic rows, fine-tune, keep the rows that this helps most, train on those.

The four phases of Grangier, Ablin and Hannun, section 2. Scores are computed once for a run, and kept as a table by row number
that knows the generic and the specific data it is of; `SECONDS` in its settings is what they cost.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.data import Dataset, RowView
from bilevel.devices import sharding
from bilevel.devices.processes import remove_folder
from bilevel.offline.contrastive import LossTable, highest_fraction, load_gains, score_gains
from bilevel.offline.irreducible import ScoringClock, unwrapped
from bilevel.study.context import Context
from bilevel.study.fitting import finetuning
from bilevel.study.spec import Switch
from bilevel.types import UserError

NAME = "contrastive_scores.safetensors"
FOLDER = "contrastive_finetuned"
SECONDS = "seconds"
"""That fine-tuning and scoring took, without compiling, evaluating and saving."""
DIGEST = "scores_digest"


def switch(s: Any, context: Context) -> tuple[Switch, dict[str, str]]:
    """Return when rows are chosen and how, and what identifies scores that come from another run."""
    first, file = _checked(s, context), s.scores or context.directory / NAME

    def rows(state: Any) -> tuple[Dataset, dict[str, float]]:
        scores = _load(file, context) if file.exists() else _scored(s, context, state, file)
        report = {"preparation_seconds": scores.settings.get(SECONDS, 0.0), "preparation_step": float(first)}
        return RowView(unwrapped(context.splits.train)[0], highest_fraction(scores, s.fraction)), report

    given = {}
    if s.scores is not None:
        given = context.identified(DIGEST, s.scores, lambda: [_load(s.scores, context).losses.tobytes()])
    return Switch(first, rows, file.exists), given


def _checked(s: Any, context: Context) -> int:
    """The steps before selection."""
    steps, size, scored = context.study.steps, context.study.batch_size, len(context.splits.train)
    if s.scores is not None and s.scores.exists():
        scored = int(np.isfinite(_load(s.scores, context).losses).sum())
    elif s.rows:
        scored = min(s.rows, scored)
    if round(s.fraction * scored) < size:
        raise UserError(
            f"--contrastive.fraction {s.fraction} of {scored} scored rows keeps fewer than the --batch-size {size}: keep a "
            "larger share, or score more rows."
        )
    first = round(s.start * steps)
    if not 0 < first < steps:
        raise UserError(
            f"--contrastive.start {s.start} leaves {first} of {steps} steps before selection: choose a share that leaves at "
            "least one step before it and one after."
        )
    return first


def _scored(s: Any, context: Context, state: Any, file: Path) -> LossTable:
    """Phases (ii) and (iii): fine-tunes the pre-trained parameters, and scores generic training rows by both.

    The score is the loss before minus the loss after fine-tuning, by row number; NaN where a row was not scored.
    """
    model, train, clock, folder = context.model(), context.splits.train, ScoringClock(), context.directory / FOLDER
    before = sharding.whole(context.mesh, (state.params, state.model_state))
    after, seconds = finetuning(context, model, context.evaluate(model), s.finetune_steps, lambda: before)(folder)
    rows = np.arange(len(train))
    if 0 < s.rows < len(train):
        rows = np.sort(np.random.default_rng([context.seed, 5_000_003]).choice(rows, s.rows, replace=False))
    first, second = sharding.local((before, (after.params, after.model_state)))
    scores = score_gains(
        model.evaluation, first, second, RowView(train, rows), context.splits.specific,
        batch_size=model.at_once, on_batch=clock,
        settings={"finetune_steps": s.finetune_steps, "seed": context.seed},
    )  # fmt: skip
    scores = dataclasses.replace(scores, settings={**scores.settings, SECONDS: seconds + clock.seconds})
    if jax.process_index() == 0:
        scores.save(file)
    remove_folder(folder)
    return scores


def _load(path: Path, context: Context) -> LossTable:
    if not path.exists():
        raise UserError(f"There are no scores at {path}: give --contrastive.scores the {NAME} of a run of contrastive.")
    return load_gains(path, context.splits.train, context.splits.specific)
