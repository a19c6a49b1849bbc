"""The devices that share a batch along a mapped axis.

It is the axis of `pmap` or `shard_map`; without one nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.types import Array


@dataclass(frozen=True)
class Axis:
    """The devices along a mapped axis; without a name, one device alone.

    For use inside of the mapped function.

    Alone, sums, means and gathered arrays are what the device has. So it is under plain `jit`, with sharded arrays too: there
    the compiler sees all rows, and does what is necessary.
    """

    name: str | None = None

    @property
    def size(self) -> int:
        """Number of devices."""
        return 1 if self.name is None else jax.lax.axis_size(self.name)

    @property
    def index(self) -> Array | int:
        """Number of this device, from 0."""
        return 0 if self.name is None else jax.lax.axis_index(self.name)

    def fold(self, key: Array) -> Array:
        """Derive a random key of this device's own."""
        return key if self.name is None else jax.random.fold_in(key, self.index)

    def sum(self, tree: Any) -> Any:
        """Sum each array over the devices."""
        return tree if self.name is None else jax.lax.psum(tree, self.name)

    def mean(self, tree: Any) -> Any:
        """Average each array over the devices.

        Counters and random keys have no mean: they are the first device's.
        """
        return tree if self.name is None else jax.tree.map(self._mean, tree)

    def max(self, x: Array) -> Array:
        """Take the largest value of any device, element by element."""
        return x if self.name is None else jax.lax.pmax(x, self.name)

    def gather(self, x: Array) -> Array:
        """Join the rows of all devices: `[b/n, …]` -> `[b, …]` on each."""
        return x if self.name is None else jax.lax.all_gather(x, self.name, tiled=True)

    def scatter(self, x: Array) -> Array:
        """Sum over the devices and keep this device's rows: `[b, …]` -> `[b/n, …]`."""
        return x if self.name is None else jax.lax.psum_scatter(x, self.name, scatter_dimension=0, tiled=True)

    def spread(self, tree: Any) -> Any:
        """Mark equal values as differing by device.

        Differentiation then leaves the summing to us.
        """
        if self.name is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.name, to="varying"), tree)

    def _mean(self, x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jax.lax.pmean(x, self.name)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._mean(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        first = jnp.where(self.index == 0, x, jnp.zeros_like(x))
        return self.sum(first).astype(x.dtype)


ALONE = Axis()
