"""The network of `bilevel.mentornet`: is the label of a row right?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel.types import Array, Params


class MentorFeatures(NamedTuple):
    """What a mentor sees of rows; all `[b]`."""

    losses: Array
    """ℓ_i(θ), float32."""
    differences: Array
    """ℓ_i(θ) minus the moving average of a percentile of the losses, float32."""
    labels: Array
    """int32."""
    progress: Array
    """Share of the training that is over, float32 in [0, 1]: the same for all rows."""


MentorFn: TypeAlias = Callable[[Params, MentorFeatures], Array]
"""(parameters, features) -> logits of "the label is right", float32 `[b]`; such as `bilevel.nn.mentor_net.MentorNetwork`."""


class MentorNetwork(nn.Module):
    """Embeddings of the label and of the percentage of training, a layer over the losses, one hidden layer, a logit.

    Reference: Jiang et al., "MentorNet", ICML 2018, for its features and layers: embeddings of size 2 and 5, 20 hidden units with
      tanh. Its recurrent layer over the history of a row's losses has a history of one entry here, and is a dense layer.
    """

    num_classes: int
    label_width: int = 2
    progress_width: int = 5
    loss_width: int = 20
    hidden: int = 20

    @nn.compact
    def __call__(self, seen: MentorFeatures) -> Array:
        """Features of `[b]` rows -> logits, float32 `[b]`; 0 at first, so that all rows weigh the same."""
        percent = jnp.clip((100 * seen.progress).astype(jnp.int32), 0, 99)
        label = nn.Embed(self.num_classes, self.label_width, name="label")(seen.labels)
        progress = nn.Embed(100, self.progress_width, name="progress")(percent)
        losses = jnp.stack([seen.losses, seen.differences], axis=-1)
        x = nn.tanh(nn.Dense(self.loss_width, name="losses")(losses))
        x = nn.tanh(nn.Dense(self.hidden, name="hidden")(jnp.concatenate([label, progress, x], axis=-1)))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(x)[:, 0]


Mentor: TypeAlias = tuple[MentorFn, Params]


def mentor(network: MentorNetwork, rng: Array) -> Mentor:
    """The first two arguments of `bilevel.mentornet`: the network as a function, and its parameters at the start."""

    def logits(params: Params, seen: MentorFeatures) -> Array:
        found = network.apply({"params": params}, seen)
        assert isinstance(found, jax.Array)
        return found

    zeros = jnp.zeros(1)
    return logits, jax.jit(network.init)(rng, MentorFeatures(zeros, zeros, zeros.astype(jnp.int32), zeros))["params"]
