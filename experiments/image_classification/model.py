"""The model that a run trains: the classifier, alone or with a small proxy that scores rows in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax

from bilevel.nn.classification import init_variables
from bilevel.selection import scoring
from bilevel.types import Array, ModelState, Params
from experiments.image_classification.build import Losses, classifier, losses_of
from experiments.image_classification.config import SCORING, Config
from experiments.image_classification.data import ImageData


class Model(NamedTuple):
    """What is trained."""

    init: Callable[[Array], tuple[Params, ModelState]]
    """Random key -> parameters and model state; those of the classifier are the same with a proxy and without."""
    losses: Losses
    """`score` takes the parameters of the model that scores, the others those of `init`."""
    scored_by: str | None
    """What scores rows, in words; None for a method that does not select by a model."""


def model_of(config: Config, method: str, data: ImageData) -> Model:
    """The model of a method: a pair of networks if --weights.scorer-network names one to score for the classifier.

    Raises:
      UserError: for an unknown network, or inputs that it cannot take.
    """
    network = classifier(config, data)
    init, losses = partial(init_variables, network, shape=data.shape), losses_of(config, data, network)
    if method not in SCORING:
        return Model(init, losses, None)
    name = config.weights.scorer_network
    if name is None:
        return Model(init, losses, _described(config, data, network, "the classifier itself"))
    proxy = classifier(config, data, name)
    its = losses_of(config, data, proxy)

    def both(key: Array) -> tuple[Params, ModelState]:
        params, state = init(key)
        proxy_params, proxy_state = init_variables(proxy, jax.random.fold_in(key, 1), data.shape)
        return {"target": params, "proxy": proxy_params}, {"target": state, "proxy": proxy_state}

    joint = Losses(
        scoring.with_proxy(losses.train, its.train),
        scoring.of_target(losses.dev),
        its.score,
        scoring.of_target(losses.evaluate),
    )
    return Model(both, joint, _described(config, data, proxy, f"{name}, which is trained along on the rows picked"))


def _described(config: Config, data: ImageData, network: nn.Module, who: str) -> str:
    """How rows are scored: by what, in which precision, and normalised by what."""
    _, state = jax.eval_shape(partial(init_variables, network, shape=data.shape), jax.random.key(0))
    of = {"batch": "of the rows scored together", "running": "that the model keeps"}[config.weights.statistics]
    norm = f"BatchNorm by the statistics {of}" if "batch_stats" in state else "no BatchNorm"
    dtype = config.weights.scoring_dtype or config.model.dtype
    return f"scored by {who}, by a forward pass in {dtype}, {norm}"
