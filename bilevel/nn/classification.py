"""Image networks as losses: cross-entropy a row, the new BatchNorm statistics, and whether the row is classified right."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params

Prepare = Callable[[Array, Array], Array]
"""`prepare(images, rng) -> images`: uint8 `[b, H, W, C]` and a key -> what the network takes; see `bilevel.nn.augment`."""


def init_variables(module: nn.Module, rng: Array, shape: tuple[int, ...]) -> tuple[Params, ModelState]:
    """The parameters and the model state of a fresh network; works under `jax.eval_shape`.

    Args:
      module: called as `module.apply(variables, inputs, train=bool)`.
      rng: a key.
      shape: of one input, `(H, W, C)` or `(d,)`.

    Returns:
      params, float32; and the other collections: {"batch_stats": …} with BatchNorm, {} without.
    """
    variables = module.init(rng, jnp.zeros((1, *shape), jnp.float32), train=False)
    state = {name: collection for name, collection in variables.items() if name != "params"}
    return variables["params"], state


def classification_loss(
    module: nn.Module,
    *,
    train: bool = True,
    prepare: Prepare | None = None,
    axis_name: str | None = None,
    inputs: str = "image",
    label: str = "label",
) -> LossFn:
    """The loss of a batch {inputs: `[b, H, W, C]` or `[b, d]`, label: integer `[b]`}: −log p(label | input), float32 `[b]`.

    The random key of a call is split in two: one for `prepare`, one for dropout. So augmentation and dropout of a step are
    the same in all evaluations that share the key, and a function of (seed, step) in `make_step`.

    Args:
      module: called as `module.apply(variables, inputs, train=bool)`, such as `bilevel.nn.resnet.resnet18()`.
      train: BatchNorm normalises by the batch and moves its statistics, and dropout is on; False uses the statistics and
        leaves the model state as it is.
      prepare: what is done to the inputs of the batch on the device; None gives them to the network as they are.
      axis_name: the mapped axis over which BatchNorm takes its means; None leaves the module's own `axis_name`. Only for
        modules that have that field; give `make_step` the same name.
      inputs: name of the inputs in the batch.
      label: name of the labels in the batch.

    Returns:
      A loss whose metrics are `correct`, float32 `[b]`: 1 where the largest logit is that of the label.
    """
    network = module if axis_name is None else module.clone(axis_name=axis_name)

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        for_inputs, for_dropout = jax.random.split(rng)
        x = batch[inputs] if prepare is None else prepare(batch[inputs], for_inputs)
        variables = {"params": params, **model_state}
        if train:
            logits, changed = network.apply(
                variables, x, train=True, mutable=list(model_state), rngs={"dropout": for_dropout}
            )
            model_state = trees.in_structure({**model_state, **changed}, model_state)
        else:
            logits = network.apply(variables, x, train=False)
        assert isinstance(logits, jax.Array)
        labels = batch[label].astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        return losses, LossAux(model_state, {"correct": correct})

    return loss
