"""Token-level selection: training on the tokens that a reference model of the specific data finds worth learning (Rho-1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bilevel import methods
from bilevel.data import Dataset, WithColumn, digest
from bilevel.data.cache import cached_folder
from bilevel.devices import sharding
from bilevel.devices.processes import of_first
from bilevel.offline.irreducible import ScoringClock, unwrapped
from bilevel.offline.token_losses import NAME, open_token_losses, write_token_losses
from bilevel.selection.tokens import REFERENCE, token_selection
from bilevel.study.context import Context
from bilevel.study.known_rows import SECONDS, fitted, trained_seconds
from bilevel.study.spec import RATE, Plan, Spec, Start, plan_over
from bilevel.study.task import Model
from bilevel.training.fit import Fit, best_of
from bilevel.training.random_search import Among
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.settings import Count, Share, plain
from bilevel.types import UserError


@dataclass(frozen=True)
class TokenSelection:
    """Of each row the tokens whose loss exceeds most that of a reference model, which is trained on the specific rows (Rho-1)."""

    share: Share = 0.6
    """Share of a row's tokens that is trained on."""
    reference_network: str | None = None
    """Network of the reference model; none given: that of the target."""
    reference_steps: Count = 10_000
    """Its most training steps; it ends when valid has not improved for 500, and its best parameters are kept."""
    reference_seed: int = 0
    """Of its training: it is the same for all seeds of a comparison."""


def _plan(s: TokenSelection, context: Context) -> Plan:
    model, reference = context.trained_model(), context.model(network=s.reference_network)
    if model.tokens is None or reference.tokens is None:
        raise UserError(
            "token_selection needs a task whose losses are of tokens, and those of this one are not: omit it."
        )
    train = context.splits.train

    def rows() -> WithColumn:
        folder, _ = _scored(s, context, reference)
        values = open_token_losses(folder, len(unwrapped(train)[0]))
        return WithColumn(train, REFERENCE, values, folder.parent.name)

    def start(state: object) -> Start:
        _, seconds = _scored(s, context, reference)
        return Start({}, {"preparation_seconds": seconds})

    selecting = model._replace(loss=token_selection(model.tokens(True), s.share))
    return plan_over(context, selecting, methods.uniform(), weighs=False, rows=rows, start=start)


def _scored(s: TokenSelection, context: Context, model: Model) -> tuple[Path, float]:
    """The folder of the reference losses, made now if there is none, and the seconds that it took to make them."""
    rows, train = context.splits.held_out or context.splits.specific, context.splits.train
    fit = fitted(context, model, s.reference_network, rows, s.reference_steps, s.reference_seed)
    settings = plain({**fit.settings, "scored": train.content_hash})
    folder = context.config.prepared / f"tokens-{digest([json.dumps(settings, sort_keys=True)])[:12]}"
    table = folder / "table"
    if not of_first((table / NAME).exists):
        _score(fit, model, train, folder / "model", table)
    return table, sum(of_first(lambda: read_json(table / SECONDS)).values())


def _score(fit: Fit, model: Model, train: Dataset, fitted_in: Path, table: Path) -> None:
    """Train the reference model, which all processes do together, and write its losses, which each does for itself."""
    best, clock = best_of(fit, fitted_in), ScoringClock()
    training = trained_seconds(fitted_in)
    params, model_state = sharding.local((best.params, best.model_state))
    assert model.tokens is not None
    tokens = model.tokens(False)

    def write(place: Path) -> None:
        write_token_losses(place, tokens, params, model_state, train, batch_size=model.at_once, on_batch=clock)
        write_json(place / SECONDS, {"training": training, "scoring": clock.seconds})

    rows = len(unwrapped(train)[0])
    work = "Writing the reference model's losses of tokens"
    cached_folder(table, lambda place: open_token_losses(place, rows), write, work=work)


SPECS: dict[str, Spec] = {
    "token_selection": Spec(TokenSelection, _plan, {**RATE, "share": Among((0.3, 0.6, 0.8))}, in_all=False),
}
