"""A model that scores rows: the one that is trained, or a small proxy that is trained along with it."""

from __future__ import annotations

from typing import Any

import jax

from bilevel.selection import scoring
from bilevel.study.context import Context
from bilevel.study.task import Model, ModelOptions
from bilevel.types import Array, LossFn, ModelState, Params


def paired(
    context: Context, options: ModelOptions, network: str | None, dtype: str | None, statistics: str
) -> tuple[Model, LossFn, str]:
    """Return what is trained, the loss that scores rows, and what scores them in words.

    Args:
      context: of the run.
      options: of the target.
      network: of a proxy that scores; None: the target itself.
      dtype: of the scoring forward pass; None: that of the model.
      statistics: "batch" or "running".
    """
    target = context.model(options)
    if network is None:
        score = _scoring(context.model(options._replace(dtype=dtype)), statistics)
        return target, score, _described(target, statistics, dtype, "the target itself")
    proxy = context.model(options._replace(network=network))
    score = _scoring(context.model(options._replace(network=network, dtype=dtype)), statistics)

    def init(key: Array) -> tuple[Params, ModelState]:
        params, state = target.init(key)
        proxy_params, proxy_state = proxy.init(jax.random.fold_in(key, 1))
        return {"target": params, "proxy": proxy_params}, {"target": state, "proxy": proxy_state}

    both = target._replace(
        init=init,
        loss=scoring.with_proxy(target.loss, proxy.loss),
        specific_loss=scoring.of_target(target.specific_loss),
        evaluation=scoring.of_target(target.evaluation),
        scoring=None,
        part=None,
    )
    return both, score, _described(proxy, statistics, dtype, f"{network}, which is trained along on the rows picked")


def _scoring(model: Model, statistics: str) -> LossFn:
    return model.evaluation if model.scoring is None else model.scoring(statistics)


def _described(model: Model, statistics: str, dtype: Any, who: str) -> str:
    _, state = jax.eval_shape(model.init, jax.random.key(0))
    of = {"batch": "of the rows scored together", "running": "that the model keeps"}[statistics]
    norm = f"BatchNorm by the statistics {of}" if "batch_stats" in state else "no BatchNorm"
    return f"scored by {who}, by a forward pass in {dtype or 'the type of the model'}, {norm}"
