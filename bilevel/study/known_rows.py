"""Numbers for every training row that are known before training: irreducible losses, and entropies of a proxy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bilevel.data import Dataset, RowView, digest, given_by
from bilevel.devices import sharding
from bilevel.devices.processes import of_first
from bilevel.offline.irreducible import ScoringClock, cross_scored, half, score_rows
from bilevel.offline.loss_table import LossTable, highest
from bilevel.selection.scoring import entropies
from bilevel.study.context import Context
from bilevel.study.fitting import fit_of
from bilevel.study.task import Model
from bilevel.training.fit import FITTED, Fit, best_of
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.settings import plain
from bilevel.types import ModelState, Params, UserError

TABLE = "table.safetensors"
_NUMBER = "number"
"""Setting of tables that hold no losses: what they hold."""
_IRREDUCIBLE, _MODEL = "irreducible", "model"
SECONDS = "seconds.json"
"""Beside a table: the seconds of the updates of the models that it is from, and of their scoring the rows, as estimated."""


_Fitted: TypeAlias = tuple[Params, ModelState]


class Known(NamedTuple):
    """Numbers of rows, and what they cost."""

    table: LossTable
    seconds: float
    """Of training and scoring; 0 for a table without SECONDS beside it."""


def fitted(context: Context, model: Model, network: str | None, rows: Dataset, steps: int, seed: int) -> Fit:
    """Describe a model that is trained on some rows; the loss on valid, if the task measures it, decides what is kept."""
    measures = context.task.measures
    return fit_of(
        context.study, context.mesh, model, context.evaluate(model), rows, context.splits.deciding,
        {"task": context.config.task, "network": network}, steps=steps, seed=seed,
        measure=next((m for m in measures if m.name == "loss"), measures[0]),
    )  # fmt: skip


def trained_seconds(folder: Path) -> float:
    """Return the seconds of the updates of a model that was fitted in a folder."""
    return of_first(lambda: read_json(folder / FITTED)["seconds"])


def irreducible_losses(context: Context, s: Any) -> Known:
    """Return the irreducible losses of the training rows: from the file given, an earlier start, or learned now.

    Reference: RHO-LOSS, algorithm 1, lines 1 to 4; for `halves`, section 5.3.
    """
    train, seed = context.splits.train, s.held_out_seed
    if s.table is not None:
        return Known(given_losses(context, s), _seconds(s.table.parent))
    model, fits, settings = _irreducible(context, s)

    def compute(models: list[_Fitted]) -> tuple[LossTable, float]:
        clock = ScoringClock()
        given: dict[str, Any] = {"batch_size": model.at_once, "settings": settings, "on_batch": clock}
        if not s.halves:
            return score_rows(model.evaluation, *models[0], train, **given), clock.seconds
        return cross_scored(model.evaluation, (models[0], models[1]), train, seed=seed, **given), clock.seconds

    return _kept(context, _IRREDUCIBLE, settings, fits, compute)


def held_out_model(context: Context, s: Any) -> tuple[Params, ModelState]:
    """Return the model of the irreducible losses, without halves or a table, on this process's devices."""
    _, (fit,), settings = _irreducible(context, s)
    best, _ = fit(_place(context, _IRREDUCIBLE, settings) / _MODEL)
    return sharding.local((best.params, best.model_state))


def _irreducible(context: Context, s: Any) -> tuple[Model, list[Fit], dict[str, Any]]:
    """The model that scores, what is fitted for it, and what the table depends on."""
    rows = [half(context.splits.train, i, s.held_out_seed) for i in (0, 1)] if s.halves else [context.splits.held_out]
    model, about = context.model(network=s.held_out_network), (s.held_out_steps, s.held_out_seed)
    fits = [fitted(context, model, s.held_out_network, part, *about) for part in rows if part is not None]
    of_halves = {"halves": True, "half_seed": s.held_out_seed} if s.halves else {}
    return model, fits, {**fits[0].settings, **of_halves}


def check_irreducible(context: Context, s: Any) -> dict[str, str]:
    """Refuse what `irreducible_losses` would refuse, without training; return what identifies a table that is given."""
    flag = context.flag
    if s.table is not None:
        losses = given_losses(context, s).losses
        return context.identified("table_digest", s.table, lambda: [losses.tobytes()])
    if context.splits.held_out is None and not s.halves:
        raise UserError(
            f"{context.splits.train.name} has no held-out rows to learn irreducible losses from: give --data.held-out a "
            f"share, or --{flag}.halves, or --{flag}.table."
        )
    if s.held_out_network is not None:
        context.model(network=s.held_out_network)
    return {}


def given_losses(context: Context, s: Any) -> LossTable:
    """Return the table of another run, if it is of these data and holds losses."""
    with given_by(f"--{context.flag}.table"):
        table = LossTable.load(s.table, content_hash=context.splits.train.content_hash, settings=None)
    if _NUMBER in table.settings:
        raise UserError(
            f"The table {s.table} holds the {table.settings[_NUMBER]} of each row, not irreducible losses: give the table "
            "of a rho_loss or irreducible_loss run."
        )
    return table


def uncertain_rows(context: Context, s: Any) -> tuple[RowView, float]:
    """Return the training rows that a proxy, trained on all of them, is least sure of: the largest entropies.

    And the seconds of its training and scoring.

    Reference: Coleman et al., "Selection via proxy", ICLR 2020, section 3 (maximum entropy); the baseline SVP of RHO-LOSS.
    """
    train, model = context.splits.train, context.model(network=s.network)
    fit = fitted(context, model, s.network, train, s.steps, s.seed)
    settings = {**fit.settings, _NUMBER: "entropy"}

    def compute(models: list[_Fitted]) -> tuple[LossTable, float]:
        assert model.scoring is not None
        clock = ScoringClock()
        table = score_rows(
            model.scoring("running"), *models[0], train, batch_size=model.at_once, settings=settings,
            read=lambda losses, metrics, batch: entropies(metrics["logits"]), on_batch=clock,
        )  # fmt: skip
        return table, clock.seconds

    table, seconds = _kept(context, "svp", settings, [fit], compute)
    count = max(context.study.batch_size, round(s.fraction * len(train)))
    return RowView(train, highest(table, min(count, len(train)))), seconds


def _kept(
    context: Context, name: str, settings: dict[str, Any], fits: list[Fit],
    compute: Callable[[list[_Fitted]], tuple[LossTable, float]],
) -> Known:  # fmt: skip
    """The table in a folder that is named after its settings, made now if there is none; `compute` also counts its seconds."""
    folder = _place(context, name, settings)
    if not of_first((folder / TABLE).exists):
        places = [folder / (_MODEL if len(fits) == 1 else f"half{i}") for i in range(len(fits))]
        best = [best_of(fit, place) for fit, place in zip(fits, places, strict=True)]
        table, scoring = compute([sharding.local((b.params, b.model_state)) for b in best])
        write_json(folder / SECONDS, {"training": sum(map(trained_seconds, places)), "scoring": scoring})
        table.save(folder / TABLE)
    table = LossTable.load(folder / TABLE, content_hash=context.splits.train.content_hash, settings=plain(settings))
    return Known(table, _seconds(folder))


def _place(context: Context, name: str, settings: dict[str, Any]) -> Path:
    return context.config.prepared / f"{name}-{digest([json.dumps(plain(settings), sort_keys=True)])[:12]}"


def _seconds(folder: Path) -> float:
    file = folder / SECONDS
    return of_first(lambda: sum(read_json(file).values()) if file.exists() else 0.0)
