"""The vocabulary of the library: batches, losses, logits, and the error that users see.

Everything here is a plain type. A batch is any pytree of arrays that share their leading axis, but for what it marks as
`Shared`; the library never looks inside it. Parameters are any pytree of floating-point arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
from flax import struct

Array: TypeAlias = jax.Array
Batch: TypeAlias = Any
"""A pytree of arrays that share their leading axis, and of `Shared` nodes."""
Params: TypeAlias = Any
"""A pytree of floating-point arrays."""
ModelState: TypeAlias = Any
"""What a model changes while it trains besides its parameters (BatchNorm statistics); `{}` when there is nothing."""
Metrics: TypeAlias = dict[str, Array]

NOT_COMPUTED = -math.inf
"""The value of a metric on steps that do not compute it; means leave it out. NaN always says that something went wrong, and
JAX_DEBUG_NANS=1 stops at nothing else."""


@struct.dataclass
class Shared:
    """Marks arrays of a batch that belong to no row, such as captions that all rows are compared with.

    Whatever takes, counts, divides or spreads the rows of a batch leaves them whole: filters, micro-batches, meshes (every device
    has all of them) and loaders. Under `shard_map`, `bilevel.sharding.batch_specs` gives the specs of such a batch.

        batch = {"x": rows, "past": Shared({"text": texts, "real": real})}
        batch["past"].arrays["text"]
    """

    arrays: Any
    """A pytree of arrays of any shapes."""


class UserError(ValueError):
    """A mistake that the user can correct; the message says what was found, where, and what to do."""


class LossAux(NamedTuple):
    """What a loss returns besides the losses."""

    model_state: ModelState
    """The model state after this evaluation. Only the θ-update's own evaluation is allowed to keep it."""
    metrics: dict[str, Array]
    """Per-example metrics, each with the rows as its leading axis; `{}` when there are none. Of those of shape `[b]` the step
    reports the mean over the rows it trained on. Scorers read `logits` `[b, C]`, those of a classifier, and `hidden` `[b, d]`,
    the inputs of its last layer (`bilevel.nn.head.with_head` adds both); what nobody reads costs nothing under `jit`."""


class LossFn(Protocol):
    """Per-example losses: `loss(params, model_state, batch, rng) -> (losses, aux)`, losses float32 `[b]`.

    For sequences an example's loss is the mean over its own unpadded tokens.
    """

    def __call__(self, params: Params, model_state: ModelState, batch: Batch, rng: Array, /) -> tuple[Array, LossAux]:
        """Evaluate the losses of one batch."""
        ...


TokenLosses: TypeAlias = Callable[[Params, ModelState, Batch, Array], tuple[Array, Array]]
"""(θ, model state, batch, key) -> the nats of each token, float32 `[b, T]`, and whether it is predicted, bool `[b, T]`."""
LogitFn: TypeAlias = Callable[[Params, Batch], Array]
"""The weighting network: `weighting(weight_params, batch) -> logits`, float32 `[b]`. It never sees θ."""
