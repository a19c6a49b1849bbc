"""Numbers for every training row that are known before training: irreducible losses, and entropies of a proxy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilevel.data import Dataset, RowView, digest
from bilevel.offline.irreducible import cross_scored, half, score_rows
from bilevel.offline.loss_table import LossTable, highest
from bilevel.selection.scoring import entropies
from bilevel.study.config import plain
from bilevel.study.context import Context
from bilevel.study.fitting import Fit
from bilevel.study.task import ModelOptions
from bilevel.types import UserError

TABLE = "table.safetensors"
_NUMBER = "number"
"""Setting of tables that hold no losses: what they hold."""
_BATCH = 512


def fit_of(context: Context, network: str | None, rows: Dataset, steps: int, seed: int) -> Fit:
    """Describe a model that is trained on some rows; the loss on valid, if the task measures it, decides what is kept."""
    measures = context.task.measures
    measure = next((m for m in measures if m.name == "loss"), measures[0])
    model = context.model(ModelOptions(network=network))
    about = {"task": context.config.task, "network": network}
    return Fit(
        context.study,
        model,
        context.evaluate(model),
        rows,
        context.splits.deciding,
        about,
        steps,
        seed,
        context.mesh,
        measure,
    )


def irreducible_losses(context: Context, s: Any) -> LossTable:
    """Return the irreducible losses of the training rows: from the file given, an earlier start, or learned now.

    Args:
      context: of the run.
      s: settings with the fields of `IrreducibleLosses`.

    Raises:
      UserError: there are no held-out rows, or a file is of other data or settings.

    Reference: RHO-LOSS, algorithm 1, lines 1 to 4; for `halves`, section 5.3.
    """
    train = context.splits.train
    if s.table is not None:
        return _given(s.table, train)
    if s.halves:
        fits = [
            fit_of(context, s.held_out_network, half(train, i, s.held_out_seed), s.held_out_steps, s.held_out_seed)
            for i in (0, 1)
        ]
        settings = {**fits[0].settings, "halves": True, "half_seed": s.held_out_seed}

        def compute(folder: Path) -> LossTable:
            one, two = (fit(folder / f"half{i}") for i, fit in enumerate(fits))
            models = ((one.params, one.model_state), (two.params, two.model_state))
            return cross_scored(
                one.model.evaluation, models, train, batch_size=_BATCH, settings=settings, seed=s.held_out_seed
            )

        return _kept(context, "irreducible", settings, compute)
    held_out = context.splits.held_out
    assert held_out is not None
    fit = fit_of(context, s.held_out_network, held_out, s.held_out_steps, s.held_out_seed)

    def compute_one(folder: Path) -> LossTable:
        found = fit(folder / "model")
        return score_rows(
            found.model.evaluation, found.params, found.model_state, train, batch_size=_BATCH, settings=fit.settings
        )

    return _kept(context, "irreducible", fit.settings, compute_one)


def check_irreducible(context: Context, s: Any, name: str) -> None:
    """Refuse what `irreducible_losses` would refuse, without training.

    Raises:
      UserError: there are no held-out rows, or the file given is of other data or holds no losses.
    """
    flag = name.replace("_", "-")
    if s.held_out_steps < 1:
        raise UserError(f"--{flag}.held-out-steps {s.held_out_steps} must be at least 1.")
    if s.table is not None:
        _given(s.table, context.splits.train)
    elif context.splits.held_out is None and not s.halves:
        raise UserError(
            f"{context.splits.train.name} has no held-out rows to learn irreducible losses from: give --data.held-out a "
            f"share, or --{flag}.halves, or --{flag}.table."
        )
    elif s.held_out_network is not None:
        context.model(ModelOptions(network=s.held_out_network))


def uncertain_rows(context: Context, s: Any) -> RowView:
    """Return the training rows that a proxy, trained on all of them, is least sure of: the largest entropies.

    Reference: Coleman et al., "Selection via proxy", ICLR 2020, section 3 (maximum entropy); the baseline SVP of RHO-LOSS.
    """
    train = context.splits.train
    fit = fit_of(context, s.network, train, s.steps, s.seed)
    settings = {**fit.settings, _NUMBER: "entropy"}

    def compute(folder: Path) -> LossTable:
        found = fit(folder / "model")
        assert found.model.scoring is not None
        return score_rows(
            found.model.scoring("running"), found.params, found.model_state, train, batch_size=_BATCH, settings=settings,
            read=lambda losses, metrics, batch: entropies(metrics["logits"]),
        )  # fmt: skip

    table = _kept(context, "svp", settings, compute)
    count = max(context.study.batch_size, round(s.fraction * len(train)))
    return RowView(train, highest(table, min(count, len(train))))


def given_digest(s: Any, train: Dataset) -> dict[str, str]:
    """Return what tells a given table from others, wherever it lies; {} where none is given."""
    return {} if s.table is None else {"table_digest": digest([_given(s.table, train).losses.tobytes()])}


def _given(path: Path, train: Dataset) -> LossTable:
    """The table of another run.

    Raises:
      UserError: it is of other data, or holds no losses.
    """
    table = LossTable.load(path, content_hash=train.content_hash, settings=None)
    if _NUMBER in table.settings:
        raise UserError(
            f"The table {path} holds the {table.settings[_NUMBER]} of each row, not irreducible losses: give the table of a "
            "rho_loss or irreducible_loss run."
        )
    return table


def _kept(context: Context, name: str, settings: dict[str, Any], compute: Callable[[Path], LossTable]) -> LossTable:
    """The table in a folder that is named after its settings, made now if there is none."""
    settings = plain(settings)
    folder = context.prepared / f"{name}-{digest([json.dumps(settings, sort_keys=True)])[:12]}"
    if not (folder / TABLE).exists():
        compute(folder).save(folder / TABLE)
    return LossTable.load(folder / TABLE, content_hash=context.splits.train.content_hash, settings=settings)
