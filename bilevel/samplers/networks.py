"""The two recurrent networks of RLSampler: plain functions over their parameters.

Both are two LSTM cells, one on top of the other, and a linear decoder; the policy network has a linear encoder in front.
An LSTM cell with input x and states h, c (Hochreiter and Schmidhuber, 1997):

    i, f, g, o = x·W + h·U + β;   c ← σ(f)·c + σ(i)·tanh(g);   h ← σ(o)·tanh(c)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import Array, UserError


class Linear(NamedTuple):
    """x·kernel + bias."""

    kernel: Array
    """`[n, m]`."""
    bias: Array
    """`[m]`."""


class Cell(NamedTuple):
    """An LSTM cell; the four gates i, f, g, o lie side by side."""

    inputs: Array
    """W `[n, 4h]`."""
    hidden: Array
    """U `[h, 4h]`."""
    bias: Array
    """β `[4h]`."""


class CellState(NamedTuple):
    """What a cell remembers, each `[h]`."""

    h: Array
    c: Array


Carry = tuple[CellState, CellState]
"""The states of the two cells of a network."""


class Network(NamedTuple):
    """Parameters of the history logger (without an encoder) or of the policy network."""

    encoder: Linear | None
    first: Cell
    second: Cell
    decoder: Linear


class SamplerParams(NamedTuple):
    """φ = (φ_η, φ_π)."""

    logger: Network
    policy: Network


@dataclass(frozen=True)
class Sizes:
    """What fixes the shapes of the parameters."""

    rows: int
    batch: int
    outputs: int
    summary: int
    logger: int
    policy: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"The sampler's size of {name} is {value}; it must be at least 1.")


def init_params(rng: Array, sizes: Sizes, scales: tuple[float, float], dtype: Any) -> SamplerParams:
    """Draw fresh parameters of both networks.

    `scales` are the standard deviations of the linear weights of the logger and of the policy.
    """
    keys = jax.random.split(rng)
    return SamplerParams(
        init_network(
            keys[0], sizes.outputs, sizes.logger, sizes.summary, linear_scale=scales[0], encodes=False, dtype=dtype
        ),
        init_network(
            keys[1], sizes.summary, sizes.policy, sizes.rows, linear_scale=scales[1], encodes=True, dtype=dtype
        ),
    )


def check_params(found: Any, wanted: Any) -> None:
    """Reject parameters of another sampler; `wanted` is a tree of shapes.

    Raises:
      UserError: naming the first array that differs.
    """
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(wanted)]
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        raise UserError(f"The parameters given to the sampler are not a `SamplerParams` of {len(names)} arrays.")
    for name, have, want in zip(names, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            raise UserError(
                f"The sampler's parameters{name} have the shape {have.shape} and the type {have.dtype}, but {want.shape} and "
                f"{want.dtype} are needed: give parameters that were learned with the same sizes on as many rows."
            )


def init_network(
    key: Array, size_in: int, hidden: int, size_out: int, *, linear_scale: float, encodes: bool, dtype: Any
) -> Network:
    """Draw fresh parameters of a network.

    Biases are 0, W Xavier, U orthogonal, linear weights normal with a standard deviation.

    Args:
      key: a typed key.
      size_in: length of the input.
      hidden: h of both cells, and of the encoder's output.
      size_out: length of the output.
      linear_scale: the standard deviation.
      encodes: whether there is an encoder.
      dtype: of all parameters.
    """
    keys = jax.random.split(key, 4)

    def linear(key: Array, n: int, m: int) -> Linear:
        return Linear(linear_scale * jax.random.normal(key, (n, m), dtype), jnp.zeros(m, dtype))

    def cell(key: Array, n: int) -> Cell:
        for_inputs, for_hidden = jax.random.split(key)
        inputs = jax.nn.initializers.xavier_uniform()(for_inputs, (n, 4 * hidden), dtype)
        recurrent = jax.nn.initializers.orthogonal()(for_hidden, (hidden, 4 * hidden), dtype)
        return Cell(inputs, recurrent, jnp.zeros(4 * hidden, dtype))

    return Network(
        linear(keys[0], size_in, hidden) if encodes else None,
        cell(keys[1], hidden if encodes else size_in),
        cell(keys[2], hidden),
        linear(keys[3], hidden, size_out),
    )


def zero_carry(network: Network) -> Carry:
    """Return the states after a reset."""
    hidden, dtype = network.first.hidden.shape[0], network.first.bias.dtype
    zeros = CellState(jnp.zeros(hidden, dtype), jnp.zeros(hidden, dtype))
    return zeros, zeros


def apply_linear(layer: Linear, x: Array) -> Array:
    """Apply a linear layer, `[…, n]` -> `[…, m]`."""
    return x @ layer.kernel + layer.bias


def advance(network: Network, x: Array, carry: Carry) -> Carry:
    """Advance both cells by a step.

    The output is `carry[1].h`, `[h]`, before the decoder.
    """
    first = _cell_step(network.first, x, carry[0])
    return first, _cell_step(network.second, first.h, carry[1])


def log_history(logger: Network, observed: Array, carry: Carry) -> tuple[Array, Carry]:
    """Log the mean logits `[d]` of a batch: (summary s `[S]`, states), equation (3)."""
    carry = advance(logger, observed, carry)
    return apply_linear(logger.decoder, carry[1].h), carry


def propose(policy: Network, summary: Array, carry: Carry, count: int) -> tuple[Array, Carry]:
    """Propose `count` draws from one summary, equation (4): logits `[count, N]`.

    With them, the states.

    What is drawn does not enter the network, so that all logits of a batch are known before the first draw, and the
    decoder, by far the most work, is one product of matrices.
    """
    assert policy.encoder is not None
    encoded = apply_linear(policy.encoder, summary)

    def call(carry: Carry, _: None) -> tuple[Carry, Array]:
        carry = advance(policy, encoded, carry)
        return carry, carry[1].h

    carry, outputs = jax.lax.scan(call, carry, None, length=count)
    return apply_linear(policy.decoder, outputs), carry


def _cell_step(cell: Cell, x: Array, state: CellState) -> CellState:
    i, f, g, o = jnp.split(x @ cell.inputs + state.h @ cell.hidden + cell.bias, 4)
    c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return CellState(jax.nn.sigmoid(o) * jnp.tanh(c), c)
