"""Numbers for every training row that are known before training: irreducible losses, and entropies of a proxy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.data import Dataset, RowView
from bilevel.nn.head import with_head
from bilevel.offline.irreducible import cross_scored, half, score_rows
from bilevel.offline.loss_table import LossTable, highest
from bilevel.selection.scoring import entropies
from bilevel.types import UserError
from experiments.image_classification.auxiliary import fit, settings_of
from experiments.image_classification.config import Config
from experiments.image_classification.data import ImageData

TABLE = "table.safetensors"
_NUMBER = "number"
"""Setting of tables that hold no losses: what they hold."""
_BATCH = 512


def irreducible_losses(config: Config, data: ImageData, folder: Path) -> LossTable:
    """The irreducible losses of the training rows: from the file given, from an earlier start, or learned now.

    Args:
      config: see `MethodConfig`.
      data: all data.
      folder: where they are kept, with the model that they come from.

    Raises:
      UserError: there are no held-out rows, or a file is of other data or settings.

    Reference: RHO-LOSS, algorithm 1, lines 1 to 4; for --weights.no-holdout, section 5.3.
    """
    check_irreducible(config, data)
    w, train = config.weights, data.train
    if w.table is not None:
        return _given(w.table, train)
    if w.no_holdout:
        halves = [half(train, which, config.data.seed) for which in (0, 1)]
        settings = {**settings_of(config, data, w.il_network, train), "halves": True}

        def compute() -> LossTable:
            fitted = [fit(config, data, w.il_network, halves[i], folder / f"half{i}") for i in (0, 1)]
            models = ((fitted[0].params, fitted[0].model_state), (fitted[1].params, fitted[1].model_state))
            return cross_scored(
                fitted[0].loss, models, train, batch_size=_BATCH, settings=settings, seed=config.data.seed
            )

        return _kept(folder, train, {**settings, "half_seed": config.data.seed}, compute)
    assert data.holdout is not None
    holdout, settings = data.holdout, settings_of(config, data, w.il_network, data.holdout)

    def compute() -> LossTable:
        model = fit(config, data, w.il_network, holdout, folder / "model")
        return score_rows(model.loss, model.params, model.model_state, train, batch_size=_BATCH, settings=settings)

    return _kept(folder, train, settings, compute)


def check_irreducible(config: Config, data: ImageData) -> None:
    """Refuses what `irreducible_losses` would refuse, without training.

    Raises:
      UserError: there are no held-out rows, or the file given is of other data or holds no losses.
    """
    w = config.weights
    if w.table is not None:
        _given(w.table, data.train)
    elif data.holdout is None and not w.no_holdout:
        raise UserError(
            f"{data.sets.name} has no held-out rows to learn irreducible losses from: give --data.holdout a share, or "
            "--weights.no-holdout, or --weights.table."
        )


def uncertain_rows(config: Config, data: ImageData, folder: Path) -> RowView:
    """The training rows that a proxy, trained on all of them, is least sure of: the largest entropies of its predictions.

    Reference: Coleman et al., "Selection via proxy", ICLR 2020, section 3 (maximum entropy); the baseline SVP of RHO-LOSS.
    """
    w, train = config.weights, data.train
    settings = {**settings_of(config, data, w.svp_network, train), _NUMBER: "entropy"}

    def compute() -> LossTable:
        model = fit(config, data, w.svp_network, train, folder / "model")
        return score_rows(
            with_head(model.loss), model.params, model.model_state, train, batch_size=_BATCH, settings=settings,
            read=lambda losses, metrics, batch: entropies(metrics["logits"]),
        )  # fmt: skip

    table = _kept(folder, train, settings, compute)
    count = max(config.batch_size, round(w.svp_fraction * len(train)))
    return RowView(train, highest(table, min(count, len(train))))


def _given(path: Path, train: Dataset) -> LossTable:
    """The table of --weights.table.

    Raises:
      UserError: it is of other data, or holds no losses.
    """
    table = LossTable.load(path, content_hash=train.content_hash, settings=None)
    if _NUMBER in table.settings:
        raise UserError(
            f"--weights.table {path} holds the {table.settings[_NUMBER]} of each row, not irreducible losses: give the "
            "table of a rho_loss or irreducible_loss run."
        )
    if len(table.losses) != len(train):
        raise UserError(
            f"--weights.table {path} holds {len(table.losses)} losses for {len(train)} training rows: score the data again."
        )
    return table


def _kept(folder: Path, train: Dataset, settings: dict[str, Any], compute: Callable[[], LossTable]) -> LossTable:
    """The table in the folder, made now if there is none."""
    if not (folder / TABLE).exists():
        compute().save(folder / TABLE)
    return LossTable.load(folder / TABLE, content_hash=train.content_hash, settings=settings)


def predictions(model: Any, rows: Dataset) -> np.ndarray:
    """The classes that a fitted model predicts, int `[N]`."""
    found = score_rows(
        with_head(model.loss), model.params, model.model_state, rows, batch_size=_BATCH, settings={},
        read=lambda losses, metrics, batch: jax.numpy.argmax(metrics["logits"], axis=-1),
    )  # fmt: skip
    return found.losses.astype(np.int64)
