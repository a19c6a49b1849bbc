"""From flags to parts: losses, optimizers, scorers, methods, step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import bilevel
from bilevel import methods
from bilevel.derivatives.linearization import Derivatives
from bilevel.nn.classification import classification_loss, init_variables
from bilevel.nn.head import with_head
from bilevel.nn.mentor_net import MentorNetwork, mentor
from bilevel.selection import filters, scoring
from bilevel.selection.scorers import Scorer
from bilevel.step.train_step import TrainStep, make_step
from bilevel.types import Array, Batch, LogitFn, LossFn, Params
from experiments.image_classification.config import DENSE, LEARNED, SCORING, SELECTING, Config
from experiments.image_classification.data import ImageData
from experiments.image_classification.networks import network_of


class Losses(NamedTuple):
    """The loss of one network, for each of its uses. All name the metrics `correct`; `score` also `logits` and `hidden`."""

    train: LossFn
    """Augmented; moves BatchNorm statistics."""
    dev: LossFn
    """In training mode, without augmentation: the loss on dev rows that weights are learned from."""
    score: LossFn
    """Of rows to choose from, without augmentation."""
    evaluate: LossFn


def losses_of(config: Config, data: ImageData, network: nn.Module) -> Losses:
    """The losses of a classifier."""

    def loss(train: bool, augmented: bool = False) -> LossFn:
        prepare = data.augmented if augmented else data.plain
        return classification_loss(network, train=train, prepare=prepare, inputs=data.inputs)

    dtype = config.weights.scoring_dtype
    scored = network if dtype is None else network.clone(dtype=jnp.dtype(dtype))
    score = scoring.scoring_loss(
        lambda train: with_head(classification_loss(scored, train=train, prepare=data.plain, inputs=data.inputs)),
        statistics=config.weights.statistics,
    )
    return Losses(loss(True, True), loss(True), score, loss(False))


def classifier(config: Config, data: ImageData, name: str | None = None) -> nn.Module:
    """The network to train, or another one by name."""
    return network_of(name or config.model.network, data.classes, data.shape, config.model)


def optimizer_of(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer of θ.

    Args:
      config: names it.
      steps: length of the schedule.
    """
    peak, warmup = config.learning_rate, min(config.warmup, max(steps - 1, 0))
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    elif config.schedule == "step":
        rate = _in_steps(peak, warmup, config)
    else:
        rate = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else peak
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    if config.optimizer == "adam":
        return optax.adam(rate)
    momentum = optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), momentum)


def _in_steps(peak: float, warmup: int, config: Config) -> optax.Schedule:
    """Warm-up, times the decay for each milestone that is passed."""
    warm = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    factor = optax.piecewise_constant_schedule(1.0, dict.fromkeys(config.milestones, config.decay))
    return lambda count: warm(count) * factor(count)


class Weighting(NamedTuple):
    """What scores or weighs rows."""

    init: Callable[[Array], Params]
    """Random key -> α."""
    logits: LogitFn | Scorer | None
    """None for a method without."""
    filter: filters.Filter | None = None


def scorer_network(config: Config, data: ImageData) -> Weighting:
    """The scorer of DDS: the classifier's architecture with weights of its own.

    Its last layer is 0 at first, so that all rows weigh the same. BatchNorm normalises by the rows that are scored together.

    Reference: Wang et al. (DDS), algorithm 1 and appendix A.4: a network over images, with one output. With
      --weights.scorer-labels, ours, it has one for each class, of which that of the row's label is the score.
    """
    labels, bound = config.weights.scorer_labels, config.weights.scorer_bound
    network = network_of(config.model.network, data.classes if labels else 1, data.shape, config.model, dropout=False)
    fresh = partial(init_variables, network, shape=data.shape)
    # Only their shapes count: they are never used to normalise.
    _, shapes = jax.eval_shape(fresh, jax.random.key(0))
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def init(key: Array) -> Params:
        params, _ = fresh(key)
        return {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}

    def logits(weights: Params, batch: Batch) -> Array:
        x = data.plain(batch[data.inputs], jax.random.key(0))
        found, _ = network.apply({"params": weights, **statistics}, x, train=True, mutable=list(statistics))
        assert isinstance(found, jax.Array)
        column = batch["label"].astype(jnp.int32) if labels else jnp.zeros(len(found), jnp.int32)
        scores = jnp.take_along_axis(found, column[:, None], axis=1)[:, 0]
        return bound * jnp.tanh(scores / bound) if bound else scores

    return Weighting(init, logits, filters.top_k(min_effective_fraction=config.weights.min_effective_fraction))


def weighting_of(config: Config, method: str, data: ImageData, losses: Losses, known: Params) -> Weighting:
    """What a method scores rows by.

    Args:
      config: of the experiment.
      method: its name.
      data: see `ImageData`.
      losses: of the model that is trained; see `model.model_of`.
      known: the parameters of a scorer that is known beforehand: {"table": float32 `[N]`}, or {}.
    """
    if method in LEARNED:
        return scorer_network(config, data)
    makers: dict[str, Callable[[], Scorer]] = {
        "rho_loss": lambda: scoring.rho_loss(losses.score, micro_batches=config.micro_batches),
        "irreducible_loss": scoring.irreducible_loss,
        "train_loss": lambda: scoring.train_loss(losses.score, micro_batches=config.micro_batches),
        "gradient_norm": lambda: scoring.gradient_norm(losses.score, micro_batches=config.micro_batches),
        "gradient_norm_is": lambda: scoring.log_gradient_norm(losses.score, micro_batches=config.micro_batches),
    }
    if method not in makers:
        return Weighting(lambda key: {}, None)
    rule = filters.importance(unbiased=True) if method == "gradient_norm_is" else filters.top_k()
    scorer = makers[method]()
    if method in SCORING and config.weights.scorer_network is not None:
        scorer = scoring.trained_proxy(scorer)
    return Weighting(lambda key: known, scorer, rule)


def build_method(config: Config, method: str, data: ImageData, seed: int) -> methods.Method:
    """The method with its settings."""
    w, guessing = config.weights, math.log(data.classes)
    if method in LEARNED:
        if method == "anograd":
            return methods.anograd(average_specific=w.average_specific)
        return methods.dds(average_specific=w.average_specific, cosine=w.reward == "cosine")
    if method == "spcl":
        return methods.spcl(optax.linear_schedule(w.pace_start * guessing, w.pace_end * guessing, config.steps))
    if method == "learning_to_reweight":
        return methods.learning_to_reweight()
    if method == "mentornet":
        network = MentorNetwork(data.classes)
        return methods.mentornet(
            *mentor(network, jax.random.key(seed)),
            optax.adam(w.mentor_learning_rate),
            num_classes=data.classes,
            total_steps=config.steps,
            burn_in=w.burn_in,
        )
    return methods.frozen() if method in SELECTING else methods.uniform()


def build_step(
    config: Config, method: str, data: ImageData, losses: Losses, weighting: Weighting, seed: int, mesh: Mesh
) -> TrainStep:
    """The train step of a method."""
    w, learned = config.weights, method in LEARNED
    derivatives: Derivatives = bilevel.Forward() if w.derivatives == "forward" else bilevel.Finite()
    return make_step(
        losses.train,
        weighting.logits,
        optimizer_of(config, config.steps),
        optax.adam(w.scorer_learning_rate) if learned else None,
        build_method(config, method, data, seed),
        batch_size=config.batch_size,
        filter=weighting.filter,
        derivatives=derivatives,
        specific_loss=losses.dev,
        mode="dense" if method in DENSE else "sparse",
        estimator=w.estimator if learned else "softmax",
        update_every=w.update_every if learned else None,
        normalize_alignments=learned and w.normalize_alignments,
        ema_decay=config.average or None,
        micro_batches=config.micro_batches,
        mesh=mesh if mesh.size > 1 else None,
    )


def loaded_rows(config: Config, method: str, rows: int, devices: int = 1) -> int:
    """Training rows that a step loads; of a training set smaller than the big batch, all that its parts can share.

    Args:
      config: of the experiment.
      method: its name.
      rows: of the training set.
      devices: that share a batch.
    """
    if method not in SELECTING:
        return config.batch_size
    parts = devices * config.micro_batches
    return config.big_batch_size if config.big_batch_size <= rows else rows // parts * parts


def dev_rows(config: Config, rows: int) -> int:
    """Rows of the dev set that a step loads, of so many."""
    return min(config.weights.dev_batch_size or config.batch_size, rows)


def observed(step: TrainStep, observe: Callable[[Batch, dict[str, Any]], dict[str, Array]]) -> TrainStep:
    """The same step with more metrics: `observe(big_batch, metrics)` -> scalars."""
    kept: dict[Any, Any] = {}

    def watching(function: Any) -> Any:
        if function not in kept:

            def watched(state: Any, big_batch: Batch, specific_batch: Batch) -> Any:
                state, metrics = function(state, big_batch, specific_batch)
                return state, {**metrics, **observe(big_batch, metrics)}

            kept[function] = watched
        return kept[function]

    names = ("step", "plain", "learn", "reuse")
    return step._replace(**{name: watching(getattr(step, name)) for name in names})
