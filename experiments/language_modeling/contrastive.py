"""Contrastive data selection: train on all generic rows, fine-tune, keep the rows that this helps most, train on those.

The four phases of Grangier, Ablin and Hannun, section 2. Scores are computed once for a run, and kept as a table by row number
that knows the generic and the specific data it is of; `SECONDS` in its settings is what they cost.
"""

from __future__ import annotations

import dataclasses
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from bilevel.data import RowView, digest
from bilevel.nn.transformer import Transformer, language_model_loss
from bilevel.offline.contrastive import LossTable, highest_fraction, load_gains, score_gains
from bilevel.training.run_dir import CONFIG_NAME, anything_saved
from bilevel.types import Params, UserError
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import local
from experiments.language_modeling.finetune import Finetuning
from experiments.runs import read_json

NAME = "contrastive_scores.safetensors"
FOLDER = "contrastive_finetuned"
SCORED_AT_ONCE = 256
SECONDS = "seconds"
"""That fine-tuning and scoring took, without compiling, evaluating and saving."""
SCORES_DIGEST = "contrastive_digest"
"""Among the settings of a run with scores of another: which they are."""


def steps_before_selection(config: Config, settings: Mapping[str, Any]) -> int:
    """The steps of contrastive on all generic rows.

    Raises:
      UserError: if they leave none before selection or none after.
    """
    first = round(settings["contrastive_start"] * config.steps)
    if not 0 < first < config.steps:
        raise UserError(
            f"--weights.contrastive-start {settings['contrastive_start']} leaves {first} of {config.steps} "
            "steps before selection: choose a share that leaves at least one step before it and one after."
        )
    return first


def compute_scores(
    settings: dict[str, Any], params: Params, model: Transformer, finetuning: Finetuning, folder: Path
) -> LossTable:
    """Phases (ii) and (iii): fine-tunes the pre-trained parameters, and scores generic training rows by both.

    Args:
      settings: `contrastive_finetune_steps`; `contrastive_rows`, the number of rows scored, drawn without replacement (0: all).
      params: pre-trained on generic data, whole on every device.
      model: the main model.
      finetuning: on the specific data of the run.
      folder: what a killed phase (ii) continues from.

    Returns:
      Loss before minus loss after fine-tuning by row number, float32 `[N]`, nats per byte; NaN where a row was not scored.

    Raises:
      Stopped: a signal stopped phase (ii).
    """
    corpora, clock = finetuning.corpora, _Clock()
    finetuned = finetuning(params, settings["contrastive_finetune_steps"], folder)
    everything = corpora.generic_train.positions
    count = min(settings["contrastive_rows"] or len(everything), len(everything))
    rng = np.random.default_rng([finetuning.seed, 5_000_003])
    rows = everything if count == len(everything) else np.sort(rng.choice(everything, count, replace=False))
    before, after = (jax.tree.map(local, each) for each in (params, finetuned.params))
    scores = score_gains(
        language_model_loss(model),
        (before, {}),
        (after, {}),
        RowView(corpora.generic, rows),
        corpora.specific["train"],
        batch_size=SCORED_AT_ONCE,
        settings={"finetune_steps": settings["contrastive_finetune_steps"], "seed": finetuning.seed},
        on_batch=clock,
    )
    return dataclasses.replace(scores, settings={**scores.settings, SECONDS: finetuned.seconds + clock.seconds})


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
            self.seconds = (now - began) * done / (done - rows)


def load_scores(path: Path, corpora: Corpora, *, own: bool) -> LossTable:
    """Reads scores, and checks that they are of these generic and these specific data.

    Args:
      path: a file of `compute_scores`, or one that was written before these files knew their specific data.
      corpora: the data.
      own: whether the run itself wrote it; another run's file that does not know its specific data is taken with a warning.

    Raises:
      UserError: if the file is missing or broken, or of other data.
    """
    if not path.exists():
        raise UserError(
            f"There are no scores at {path}: give --weights.contrastive-scores the {NAME} of a run of the method contrastive."
        )
    scores = _older_scores(path, corpora)
    if scores is None:
        return load_gains(path, corpora.generic, corpora.specific["train"])
    if not own and jax.process_index() == 0:
        print(
            f"warning: {path} does not say which specific data its scores were made for: make sure that they are these, "
            "or score again.",
            file=sys.stderr,
        )
    return scores


def _older_scores(path: Path, corpora: Corpora) -> LossTable | None:
    """The scores in a file that does not know its specific data; None for other files, readable or not."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
            rows, gain, found = stored["rows"], stored["gain"], str(stored["content_hash"])
            seconds = float(stored["seconds"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if found != corpora.generic.content_hash:
        raise UserError(
            f"The scores in {path} are of other generic data (hash {found[:12]}, here "
            f"{corpora.generic.content_hash[:12]}): give the data and --length they were computed with, or leave "
            "--weights.contrastive-scores away."
        )
    table = np.full(len(corpora.generic), np.nan, np.float32)
    table[rows] = gain
    return LossTable(table, found, {SECONDS: seconds})


def scores_digest(config: Config, corpora: Corpora, directory: Path) -> str | None:
    """What tells scores of another run, in --weights.contrastive-scores, from others, wherever they lie.

    What the run recorded stands if the scores are gone. None without the flag, and for a run that has recorded no digest: then
    their path must be the same.
    """
    given, file = config.weights.contrastive_scores, directory / CONFIG_NAME
    if given is None:
        return None
    recorded = read_json(file).get("weights", {}) if file.exists() and anything_saved(directory) else None
    if recorded is not None and (SCORES_DIGEST not in recorded or not given.exists()):
        return recorded.get(SCORES_DIGEST)
    return digest([load_scores(given, corpora, own=True).losses.tobytes()])


def check(config: Config, settings: dict[str, Any], corpora: Corpora) -> None:
    """Checks before training that what selection keeps will fill a batch.

    Raises:
      UserError: for a share out of range or too small, or scores of other data.
    """
    fraction, scored = settings["contrastive_fraction"], len(corpora.generic_train)
    if not 0 < fraction <= 1:
        raise UserError(f"--weights.contrastive-fraction {fraction} must lie in (0, 1].")
    if settings["contrastive_rows"] < 0:
        raise UserError(f"--weights.contrastive-rows {settings['contrastive_rows']} must be at least 0.")
    if settings["contrastive_scores"] is not None:
        scores = load_scores(settings["contrastive_scores"], corpora, own=True)
        scored = int(np.isfinite(scores.losses).sum())
    elif settings["contrastive_rows"]:
        scored = min(settings["contrastive_rows"], scored)
    if round(fraction * scored) < config.batch_size:
        raise UserError(
            f"--weights.contrastive-fraction {fraction} of {scored} scored rows keeps fewer than the --batch-size "
            f"{config.batch_size}: keep a larger share, or score more rows."
        )


def best_rows(scores: LossTable, fraction: float, corpora: Corpora) -> RowView:
    """The training rows with the largest gain.

    Args:
      scores: of generic rows.
      fraction: the share of the scored rows that is kept, in (0, 1] (see `check`).
      corpora: the data.
    """
    return RowView(corpora.generic, highest_fraction(scores, fraction))
