"""Scoring a big batch, and fetching the rows that a filter picks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.devices.axis import Axis
from bilevel.selection.filters import Filter, usable
from bilevel.selection.scorers import Features
from bilevel.types import Array, Batch, LogitFn, Params, UserError


class Scores(NamedTuple):
    """The weighting network's view of a big batch."""

    local: Array
    """Tempered logits of this device's rows, float32 `[B/n]`."""
    pool: Array
    """Tempered logits of the rows that this device chooses from: all `[B]` for scope "global", its own for "local"."""
    temperature: Array
    bad: Bad | None = None
    """None where no row was scored."""


class Bad(NamedTuple):
    """The rows of the big batch, of all devices, whose logit is NaN or +∞."""

    number: Array
    """int32 scalar: how many."""
    row: Array
    """int32 scalar: the first of them, by its `id` if the batch has one, else its position; −1 if there is none."""


class Rows(NamedTuple):
    """Rows picked from the big batch; with a mapped axis, this device's share of them."""

    batch: Batch
    positions: Array
    """int32: where the rows were in the big batch (of all devices for scope "global")."""
    features: Features = ()
    """What the scorer knows about the rows."""


def score(
    weighting: LogitFn, weight_params: Params, big_batch: Batch, rule: Filter, axis: Axis, left: Array | None = None
) -> Scores:
    """Score the big batch: logits divided by the filter's temperature.

    No derivative is taken. Rows that are not `left`, bool `[B/n]`, get the logit −∞.
    """
    logits = weighting(weight_params, big_batch)
    rows = trees.num_rows(big_batch)
    if logits.shape != (rows,):
        raise UserError(
            f"The weighting network returned logits of shape {logits.shape} for a batch of {rows} rows; "
            f"it must return one logit a row, shape ({rows},)."
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    bad, logits = _bad(logits, big_batch, axis), usable(logits)
    if left is not None:
        logits = jnp.where(left, logits, -jnp.inf)
    pool = axis.gather(logits) if rule.scope == "global" else logits
    temperature = rule.temperature(pool)
    if rule.scope == "local":
        # One scale for all devices: the weights of the α-gradient are one softmax over the rows of all of them.
        temperature = axis.max(temperature)
    return Scores(logits / temperature, pool / temperature, temperature, bad)


def _bad(logits: Array, big_batch: Batch, axis: Axis) -> Bad:
    found = jnp.isnan(logits) | (logits == jnp.inf)
    rows = logits.shape[0]
    numbers = jnp.arange(rows, dtype=jnp.int32) + axis.index * rows
    if isinstance(big_batch, dict) and "id" in big_batch and jnp.shape(big_batch["id"]) == (rows,):
        numbers = jnp.asarray(big_batch["id"]).astype(jnp.int32)
    first = jnp.where(jnp.any(found), numbers[jnp.argmax(found)], -1)
    return Bad(axis.sum(jnp.sum(found, dtype=jnp.int32)), axis.max(first))


def everything(big_batch: Batch, rule: Filter, axis: Axis, features: Features = ()) -> Rows:
    """Take all rows of the big batch (of this device), in their order."""
    count = trees.num_rows(big_batch)
    positions = jnp.arange(count, dtype=jnp.int32)
    if rule.scope == "global":
        positions = positions + axis.index * count
    return Rows(big_batch, positions, features)


def choose_positions(key: Array, scores: Scores, big_batch: Batch, count: int, rule: Filter) -> Array:
    """Let the filter choose `count` rows of one device's big batch: their positions, int32 `[count]`.

    Raises:
      UserError: the big batch has fewer rows.
    """
    _check_enough(count, trees.num_rows(big_batch))
    groups = () if rule.groups is None else (rule.groups(big_batch),)
    return rule.select(key, scores.pool, count, *groups)


def pick(
    key: Array,
    scores: Scores,
    big_batch: Batch,
    count: int,
    rule: Filter,
    axis: Axis,
    features: Features = (),
) -> Rows:
    """Let the filter choose `count` rows over all devices, an equal share on each.

    The rows take their `features` (of the big batch, on this device) with them.
    """
    devices = axis.size
    local_rows = trees.num_rows(big_batch)
    _check_enough(count, local_rows * devices)
    if count % devices:
        raise UserError(
            f"{count} rows cannot be divided equally among {devices} devices: choose a multiple of {devices}."
        )
    everything = (big_batch, features)
    share = count // devices
    if rule.scope == "local" or devices == 1:
        own_key = axis.fold(key) if rule.scope == "local" else key
        positions = choose_positions(own_key, scores, big_batch, share, rule)
        batch, features = trees.take(everything, positions)
        return Rows(batch, positions, features)
    groups = () if rule.groups is None else (rule.groups(big_batch),)
    positions = rule.select(key, scores.pool, count, *map(axis.gather, groups))
    batch, features = _fetch(everything, positions, local_rows, axis)
    return Rows(batch, jax.lax.dynamic_slice_in_dim(positions, axis.index * share, share), features)


def _check_enough(count: int, rows: int) -> None:
    if count > rows:
        raise UserError(
            f"The small batch asks for {count} rows but the big batch has only {rows}: "
            "raise the big batch size or lower the batch size."
        )


def _fetch(big_batch: Batch, positions: Array, local_rows: int, axis: Axis) -> Batch:
    """Collect this device's share of the rows at global `positions`: every owner adds its rows to zeros elsewhere."""
    mine = positions // local_rows == axis.index
    inside = jnp.where(mine, positions % local_rows, 0)

    def leaf(x: Array) -> Array:
        rows = jnp.take(x, inside, axis=0)
        shape = (-1,) + (1,) * (x.ndim - 1)
        owned = jnp.where(mine.reshape(shape), rows, jnp.zeros_like(rows))
        wide = owned.astype(jnp.int32) if owned.dtype == jnp.bool_ else owned
        return axis.scatter(wide).astype(x.dtype)

    return trees.map_rows(leaf, big_batch)
