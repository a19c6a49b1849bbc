"""Rules for the rows that a run picks from big batches: whole target sentences, and how often a row may be used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from bilevel.data import GROUP, GroupedData
from bilevel.offline.irreducible import unwrapped
from bilevel.selection.filters import Filter
from bilevel.selection.uses import MaxUses
from bilevel.study.context import Context
from bilevel.study.task import Weighting
from bilevel.types import Array, Batch, Params, UserError


def in_groups(context: Context, weighting: Weighting, fields: Mapping[str, Any]) -> tuple[Weighting, dict[str, Any]]:
    """Return a weighting network and fields of a plan that loads the pairs of whole target sentences."""
    languages, flag = context.splits.languages, f"--{context.flag}.filter one_of_group"
    if languages is None:
        raise UserError(
            f"{flag} picks one of the source languages of each target sentence, and these data have one: choose another filter, "
            "or give several, as in --data.source-language az,tr."
        )
    if fields.get("specific_rows") or not fields.get("picks") or not callable(weighting.logits):
        raise UserError(
            f"{flag} picks from a big batch of whole target sentences, by a network over rows: leave out "
            "specific-candidates, and mode dense."
        )
    table, logits = languages.table.rows, weighting.logits
    rows, places = context.study.batch_size, table.shape[1]
    needed, loaded = rows * places, context.loaded_rows(True)
    if loaded < needed:
        raise UserError(
            f"{flag} with --batch-size {rows} needs as many target sentences, each with {places} places, and big batches have "
            f"{loaded}: give --big-batch-size {needed} or more, and as many rows, or a smaller --batch-size."
        )

    def of_present(params: Params, batch: Batch) -> Array:
        found = logits(params, batch)
        return jnp.where(batch[GROUP] < 0, -jnp.inf, found)

    return weighting._replace(logits=of_present), {**fields, "rows": partial(GroupedData, context.splits.train, table)}


def max_uses(context: Context, rule: Filter | None) -> MaxUses | None:
    """Return the cap on how often a row is trained on, as --max-uses says; a UserError says that rows cannot be capped, or not
    so low."""
    times = context.study.max_uses
    if not times:
        return None
    if rule is not None and not rule.caps:
        raise UserError(
            f"--max-uses {times} does not fit {context.method}, whose filter ({rule.name}) may pick a row whatever its logit, or "
            f"twice at once: give --{context.flag}.filter gumbel_top_k where it has that flag, or omit --max-uses or the method."
        )
    whole, positions = unwrapped(context.splits.train)
    steps, size = context.study.steps, context.study.batch_size
    if steps * size > times * len(positions):
        raise UserError(
            f"--steps {steps} of --batch-size {size} train on {steps * size:,} rows, and --max-uses {times} leaves "
            f"{times * len(positions):,}: take fewer steps, raise --max-uses, or give more generic data."
        )
    return MaxUses(len(whole), times)
