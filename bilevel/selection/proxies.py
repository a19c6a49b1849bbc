"""Scoring by a small model instead of the one that is trained.

Selection then costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import jax

from bilevel.selection.scorers import Features, Scorer
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params


def frozen_proxy(scorer: Scorer) -> Scorer:
    """Let a scorer see a small model, trained beforehand, instead of θ.

    Its parameters are those of `frozen_proxy_params`.

    The proxy is evaluated with one and the same random key on every step.

    Reference: Coleman et al., "Selection via proxy", ICLR 2020.
    """

    def logits(weights: Params, batch: Batch, features: Features) -> Array:
        proxy = weights["proxy"]
        seen = scorer.features(proxy["params"], proxy["model_state"], batch, jax.random.key(0))
        return scorer.logits(weights["scorer"], batch, jax.lax.stop_gradient(seen))

    return Scorer(lambda *_: (), logits)


def frozen_proxy_params(params: Params, model_state: ModelState, scorer: Params = None) -> Params:
    """Join the parameters of `frozen_proxy`.

    They are the small model's, its model state, and those of the scorer, such as {"table": IL}.
    """
    return {"proxy": {"params": params, "model_state": model_state}, "scorer": {} if scorer is None else scorer}


def trained_proxy(scorer: Scorer) -> Scorer:
    """Let a scorer see the small model of `with_proxy` instead of θ.

    Its parameters are the scorer's own.

    loss = scoring.with_proxy(target_loss, proxy_loss)      # evaluate with scoring.of_target(target_loss)
    scorer = scoring.trained_proxy(scoring.rho_loss(proxy_loss))
    train = make_step(loss, scorer, optimizer, None, frozen(), batch_size=b, filter=filters.top_k())
    state = train.init(rng, {"target": …, "proxy": …}, {"table": IL}, {"target": …, "proxy": …})
    """

    def features(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> Features:
        return scorer.features(params["proxy"], model_state["proxy"], batch, rng)

    return Scorer(features, scorer.logits)


def with_proxy(target_loss: LossFn, proxy_loss: LossFn) -> LossFn:
    """Train a small model along with the target: ℓ_target + ℓ_proxy.

    On the same rows; they share no parameters.

    Its parameters and model state are {"target": …, "proxy": …}; `optax.partition` gives the two optimizers of their own. The
    value of the loss, and its metrics, are those of the target alone.
    """

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        keys = jax.random.split(rng)
        losses, aux = target_loss(params["target"], model_state["target"], batch, keys[0])
        others, other_aux = proxy_loss(params["proxy"], model_state["proxy"], batch, keys[1])
        states: dict[str, Any] = {"target": aux.model_state, "proxy": other_aux.model_state}
        # 0 in value, the proxy's gradient in derivative.
        silent = others - jax.lax.stop_gradient(others)
        return losses + silent.astype(losses.dtype), LossAux(states, aux.metrics)

    return loss


def of_target(target_loss: LossFn) -> LossFn:
    """Make the loss of the target alone over the parameters of `with_proxy`."""

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        losses, aux = target_loss(params["target"], model_state["target"], batch, rng)
        return losses, LossAux({**model_state, "target": aux.model_state}, aux.metrics)

    return loss
