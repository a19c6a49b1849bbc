"""Meta-Weight-Net: a weighting network that sees only the main model's loss.

DDS learns it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.nn.weighting import LossMLP
from bilevel.selection import scorers
from bilevel.types import Array, Batch, LossFn, Params


class LossWeighting(NamedTuple):
    """A weighting network over losses."""

    init: Callable[[Array], Params]
    """Random key -> α, the parameters of the perceptron."""
    scorer: scorers.Scorer


def meta_weight_net(loss: LossFn, hidden: int = 100, micro_batches: int = 1) -> LossWeighting:
    """Weigh rows by a learned function of their loss, s_i = mlp(ℓ_i(θ); α).

        net = meta_weight_net(loss)
        train = make_step(loss, net.scorer, optimizer, weight_optimizer, dds(), mode="dense", batch_size=B)
        state = train.init(rng, params, net.init(rng))

    ℓ_i is stop-gradiented: α moves as if the losses were given numbers. In dense mode (the papers') the losses are those of
    the θ-update's own evaluation, so that the method costs what `dds` costs. In sparse mode the B rows of each big batch are
    scored by the main model: B forward passes on every step, also on those without α-work. The paper learns α by `dds`.

    It is assembled from `scorers.of_losses` and `nn.weighting.LossMLP`: use another network in the same way.

    Args:
      loss: the `loss` of `make_step` (the same object: dense mode knows by this that it need not evaluate it again).
      hidden: units of the hidden layer.
      micro_batches: parts in which the B rows are scored in sparse mode; see `scorers.loss_features`.

    Reference: Shu et al., "Meta-Weight-Net: learning an explicit mapping for sample weighting", NeurIPS 2019; Grangier et
      al., section 5.1. The weights are a softmax over the batch, as everywhere here, instead of normalised sigmoids.
    """
    network = LossMLP(hidden)

    def logits(weight_params: Params, batch: Batch, losses: Array) -> Array:
        found = network.apply({"params": weight_params}, losses)
        assert isinstance(found, jax.Array)
        return found

    def init(rng: Array) -> Params:
        return network.init(rng, jnp.zeros(1))["params"]

    return LossWeighting(init, scorers.of_losses(loss, logits, micro_batches=micro_batches))
