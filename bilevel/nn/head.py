"""What a classifier's last layer takes and gives, for scores that need more than the loss."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError


def with_head(loss: LossFn) -> LossFn:
    """A linen module's loss with two metrics more, what the last layer takes and gives: `hidden` `[b, d]` and `logits` `[b, C]`.

    The last layer is the `nn.Dense` that is called last. What is not used costs nothing under `jit`.

    Args:
      loss: one that applies a linen module, once, outside any transformation of its own.

    Raises:
      UserError: when traced, if no `nn.Dense` is called.
    """

    def wrapped(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        seen: dict[str, Array] = {}

        def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            outputs = call(*args, **kwargs)
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                seen.update(hidden=args[0] if args else kwargs["inputs"], logits=outputs)
            return outputs

        with nn.intercept_methods(record):
            losses, aux = loss(params, model_state, batch, rng)
        if not seen:
            raise UserError(
                "with_head found no nn.Dense in the network: let its last layer be one, or return the metrics."
            )
        return losses, LossAux(aux.model_state, {**aux.metrics, **seen})

    return wrapped
