"""Contrastive data selection: train on all generic rows, fine-tune, keep the rows that this helps most, train on those.

The four phases of Grangier, Ablin and Hannun, section 2. Scores are computed once for a run, kept by row number, and belong
to one packed data set, whose hash they carry.
"""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data import RowView, evaluation_batches
from bilevel.nn.transformer import Transformer, byte_losses
from bilevel.types import Array, Params, UserError
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import local
from experiments.language_modeling.finetune import Finetuning

NAME = "contrastive_scores.npz"
FOLDER = "contrastive_finetuned"
SCORED_AT_ONCE = 256


class Scores(NamedTuple):
    """What fine-tuning on the specific data does for generic rows."""

    rows: NDArray[np.integer[Any]]
    """Integers `[n]`: row numbers in the generic data."""
    gain: NDArray[np.float32]
    """float32 `[n]`: loss before minus loss after fine-tuning, nats per byte."""
    content_hash: str
    """Of the generic data that the row numbers belong to."""
    seconds: float
    """That fine-tuning and scoring took."""


def compute_scores(
    settings: dict[str, Any], params: Params, model: Transformer, finetuning: Finetuning, folder: Path
) -> Scores:
    """Phases (ii) and (iii): fine-tunes the pre-trained parameters, and scores generic training rows by both.

    Args:
      settings: `contrastive_finetune_steps`; `contrastive_rows`, the number of rows scored, drawn without replacement (0: all).
      params: pre-trained on generic data, whole on every device.
      model: the main model.
      finetuning: on the specific data of the run.
      folder: what a killed phase (ii) continues from.

    Raises:
      Stopped: a signal stopped phase (ii).
    """
    began, corpora = time.perf_counter(), finetuning.corpora
    after = finetuning(params, settings["contrastive_finetune_steps"], folder).params
    everything = corpora.generic_train.positions
    count = min(settings["contrastive_rows"] or len(everything), len(everything))
    rng = np.random.default_rng([finetuning.seed, 5_000_003])
    rows = everything if count == len(everything) else np.sort(rng.choice(everything, count, replace=False))
    before, after = (jax.tree.map(local, each) for each in (params, after))
    gain = _gains(model, before, after, RowView(corpora.generic, rows))
    return Scores(rows, gain, corpora.generic.content_hash, time.perf_counter() - began)


def _gains(model: Transformer, before: Params, after: Params, rows: RowView) -> NDArray[np.float32]:
    """Loss before minus loss after of each row, float32 `[n]`."""

    @jax.jit
    def gains(batch: Any) -> Array:
        def losses(params: Params) -> Array:
            logits = model.apply({"params": params}, batch["tokens"])
            return byte_losses(logits, batch["tokens"], batch["length"])[0]  # pyright: ignore[reportArgumentType]

        return losses(before) - losses(after)

    found = []
    for batch in evaluation_batches(rows, SCORED_AT_ONCE):
        real = batch.pop("mask") > 0
        found.append(np.asarray(gains(batch))[real])
    return np.concatenate(found).astype(np.float32)


def save_scores(path: Path, scores: Scores) -> None:
    """Writes the scores; a reader sees all of them or none."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, **scores._asdict())
    os.replace(temporary, path)


def load_scores(path: Path, corpora: Corpora) -> Scores:
    """Reads scores, and checks that they are of these generic data.

    Raises:
      UserError: if the file is missing or broken, or of other data.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
            scores = Scores(stored["rows"], stored["gain"], str(stored["content_hash"]), float(stored["seconds"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"Cannot read the scores in {path} ({error}): give the {NAME} of a run of the method contrastive."
        ) from error
    if scores.content_hash != corpora.generic.content_hash:
        raise UserError(
            f"The scores in {path} are of other generic data (hash {scores.content_hash[:12]}, here "
            f"{corpora.generic.content_hash[:12]}): give the data and --length they were computed with, or leave "
            "--weights.contrastive-scores away."
        )
    return scores


def check(config: Config, settings: dict[str, Any], corpora: Corpora) -> None:
    """Checks before training that what selection keeps will fill a batch.

    Raises:
      UserError: for a share out of range or too small.
    """
    fraction, most = settings["contrastive_fraction"], len(corpora.generic_train)
    if not 0 < fraction <= 1:
        raise UserError(f"--weights.contrastive-fraction {fraction} must lie in (0, 1].")
    if settings["contrastive_rows"] < 0:
        raise UserError(f"--weights.contrastive-rows {settings['contrastive_rows']} must be at least 0.")
    if settings["contrastive_scores"] is not None:
        return  # the file says how many rows were scored
    scored = min(settings["contrastive_rows"] or most, most)
    if round(fraction * scored) < config.batch_size:
        raise UserError(
            f"--weights.contrastive-fraction {fraction} of {scored} scored rows keeps fewer than the --batch-size "
            f"{config.batch_size}: keep a larger share, or score more rows."
        )


def best_rows(scores: Scores, fraction: float, corpora: Corpora) -> RowView:
    """The training rows with the largest gain.

    Args:
      scores: of generic rows.
      fraction: the share of the scored rows that is kept, in (0, 1] (see `check`).
      corpora: the data.
    """
    count = max(1, round(fraction * len(scores.rows)))
    chosen = np.argsort(-scores.gain, kind="stable")[:count]
    return RowView(corpora.generic, np.sort(scores.rows[chosen]))
