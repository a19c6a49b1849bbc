"""Sums of looked-up rows, pooled over positions without storing them: what cheap scoring of bytes comes down to.

A big batch is scored without a gradient, so its forward pass may be a loop over positions that keeps `[b, width]` alone: on
CPU several times faster than the same sums over a stored `[b, T, width]`. Accelerators, which would launch a few tiny kernels
a position, take the stored form. Gradients are taken on small batches only and go through the stored form, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.types import Array


def with_gradient_of(plain: Callable[..., Array], on_cpu: Callable[..., Array]) -> Callable[..., Array]:
    """`plain`, whose value is computed as `on_cpu` on CPU; derivatives are those of `plain`. The two must be equal."""

    def chosen(*arguments: Any) -> Array:
        return jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=plain)

    function = jax.custom_vjp(chosen)

    def forward(*arguments: Any) -> tuple[Array, Any]:
        return chosen(*arguments), arguments

    def backward(arguments: Any, cotangent: Array) -> Any:
        return jax.vjp(plain, *arguments)[1](cotangent)

    function.defvjp(forward, backward)
    return function


def _bag_stored(table: Array, rows: Array, weights: Array) -> Array:
    return jnp.einsum("bt,btw->bw", weights, jnp.take(table, rows, axis=0))


def _bag_looped(table: Array, rows: Array, weights: Array) -> Array:
    def looked_up(row: Array, weight: Array) -> Array:
        return table.at[row].get(mode="promise_in_bounds") * weight[:, None]

    def add(total: Array, here: tuple[Array, Array]) -> tuple[Array, None]:
        return total + looked_up(*here), None

    # Two positions in one round: the same sums in the same order, and with a width of 32 in a quarter of the time.
    total, _ = jax.lax.scan(add, looked_up(rows[:, 0], weights[:, 0]), (rows.T[1:], weights.T[1:]), unroll=2)
    return total


bag: Callable[[Array, Array, Array], Array] = with_gradient_of(_bag_stored, _bag_looped)
"""`bag(table [n, w], rows int32 [b, T], weights [b, T]) -> [b, w]`: Σ_t weights[b, t] · table[rows[b, t]].

Rows must lie in [0, n).
"""


def _conv_at(tables: Array, bias: Array, window: Array) -> Array:
    """The convolution at one position: tokens int32 `[b, k]`, V where there is none -> `[b, w]`."""
    total = jnp.broadcast_to(bias, (window.shape[0], bias.shape[0]))
    for k in range(tables.shape[0]):
        total = total + tables[k].at[window[:, k]].get(mode="promise_in_bounds")
    return total


def _windows(tables: Array, tokens: Array, length: Array) -> Array:
    """The tokens around each position, int32 `[b, T, k]`; outside the text the row of zeros, V."""
    width, none = tables.shape[0], tables.shape[1] - 1
    real = jnp.arange(tokens.shape[1]) < length[:, None]
    known = jnp.where(real, tokens.astype(jnp.int32), none)
    before = (width - 1) // 2
    padded = jnp.pad(known, ((0, 0), (before, width - 1 - before)), constant_values=none)
    return jnp.stack([padded[:, k : k + tokens.shape[1]] for k in range(width)], axis=-1)


def conv_tables(embedding: Array, kernel: Array) -> Array:
    """Embedding `[V, d]` and kernel `[k, d, w]` -> for each tap what a token contributes, `[k, V + 1, w]`; row V is 0."""
    tables = jnp.einsum("nd,kdw->knw", embedding, kernel)
    return jnp.pad(tables, ((0, 0), (0, 1), (0, 0)))


def token_conv(tables: Array, bias: Array, tokens: Array, length: Array) -> Array:
    """The same-padded convolution over embedded tokens, as sums of looked-up rows: `[b, T]` -> `[b, T, w]`."""
    windows = _windows(tables, tokens, length)
    flat = _conv_at(tables, bias, windows.reshape(-1, windows.shape[-1]))
    return flat.reshape(*tokens.shape, -1)


def _pooled_stored(tables: Array, bias: Array, tokens: Array, length: Array) -> Array:
    real = jnp.arange(tokens.shape[1]) < length[:, None]
    active = jax.nn.relu(token_conv(tables, bias, tokens, length))
    return jnp.sum(jnp.where(real[..., None], active, 0), axis=1)


def _pooled_looped(tables: Array, bias: Array, tokens: Array, length: Array) -> Array:
    windows = jnp.moveaxis(_windows(tables, tokens, length), 1, 0)

    def active(position: Array, window: Array) -> Array:
        return jnp.where((position < length)[:, None], jax.nn.relu(_conv_at(tables, bias, window)), 0)

    def add(total: Array, here: tuple[Array, Array]) -> tuple[Array, None]:
        return total + active(*here), None

    positions = jnp.arange(tokens.shape[1])
    total, _ = jax.lax.scan(add, active(positions[0], windows[0]), (positions[1:], windows[1:]))
    return total


pooled_token_conv: Callable[[Array, Array, Array, Array], Array] = with_gradient_of(_pooled_stored, _pooled_looped)
"""`pooled_token_conv(tables [k, V + 1, w], bias [w], tokens [b, T], length [b]) -> [b, w]`: Σ_t relu(conv_t) over real tokens."""
