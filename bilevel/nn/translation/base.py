"""What encoder–decoders share: special pieces, the batch, and how a decoder is asked for one piece at a time."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax.numpy as jnp

from bilevel.types import Array, Batch, Params

PAD, UNKNOWN, END = 0, 1, 2
"""Pieces of every vocabulary. PAD also stands before the first piece of a target."""


class Decoding(NamedTuple):
    """The state of a decoder that reads k hypotheses a row."""

    fixed: Any
    """What it knows of the sources, `[r, …]`: the same for all hypotheses of a row, kept once."""
    moving: Any
    """What changes with each piece, `[r, k, …]`."""


class EncoderDecoder(Protocol):
    """A network over pairs of sentences.

    A batch has `source` int32 `[b, S]`, `target` int32 `[b, T]`, `source_length` and `target_length` int32 `[b]`.
    """

    dropout: float

    def init(self, key: Array, batch: Batch) -> Params:
        """Return parameters, float32."""
        ...

    def logits(self, params: Params, batch: Batch, rng: Array | None) -> Array:
        """Return the logits of each target piece given the source and the pieces before it, float32 `[b, T, V]`.

        `rng` draws the dropout; None: there is none.
        """
        ...

    def begin(self, params: Params, batch: Batch, length: int) -> Decoding:
        """Return the state before the first of at most `length` pieces, k = 1; of the batch only the source is read."""
        ...

    def extend(self, params: Params, decoding: Decoding, pieces: Array, position: Array) -> tuple[Array, Any]:
        """Read one more piece a hypothesis.

        Args:
          params: parameters.
          decoding: the state.
          pieces: int32 `[r, k]`, PAD at position 0.
          position: int32 scalar, from 0.

        Returns:
          The logits of the next piece, float32 `[r, k, V]`, and the new `moving` part.
        """
        ...


class Translator:
    """An `EncoderDecoder` whose network is a linen module with the methods `__call__`, `begin` and `extend`."""

    def __init__(self, network: nn.Module, dropout: float):
        self.network, self.dropout = network, dropout

    def init(self, key: Array, batch: Batch) -> Params:
        """Return parameters, float32; of the batch only the shapes count."""
        return self.network.init(key, batch)["params"]

    def logits(self, params: Params, batch: Batch, rng: Array | None) -> Array:
        """Return the logits of each target piece; see `EncoderDecoder.logits`."""
        rngs = None if rng is None else {"dropout": rng}
        return self.network.apply({"params": params}, batch, deterministic=rng is None, rngs=rngs)  # pyright: ignore[reportReturnType]

    def begin(self, params: Params, batch: Batch, length: int) -> Decoding:
        """Return the state before the first piece; see `EncoderDecoder.begin`."""
        return self.network.apply({"params": params}, batch, length, method="begin")  # pyright: ignore[reportReturnType]

    def extend(self, params: Params, decoding: Decoding, pieces: Array, position: Array) -> tuple[Array, Any]:
        """Read one more piece a hypothesis; see `EncoderDecoder.extend`."""
        return self.network.apply({"params": params}, decoding, pieces, position, method="extend")  # pyright: ignore[reportReturnType]


def shifted(target: Array) -> Array:
    """Return what a decoder reads: the target moved right by one, PAD in front."""
    return jnp.pad(target.astype(jnp.int32), ((0, 0), (1, 0)))[:, :-1]
