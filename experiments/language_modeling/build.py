"""From flags to parts: data, model, method, step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import bilevel
from bilevel import methods
from bilevel.data import (
    JoinedData,
    Loader,
    MixedLoader,
    RowView,
    TaskLoader,
)
from bilevel.derivatives.linearization import Derivatives
from bilevel.devices import sharding
from bilevel.nn.transformer import SIZES, Transformer, TransformerConfig, gathered_before
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn
from bilevel.selection import filters
from bilevel.selection.scorers import Scorer
from bilevel.state import TrainState
from bilevel.step.train_step import TrainStep, make_step
from bilevel.types import Array, LogitFn, LossFn, Params, UserError
from experiments.language_modeling.config import DENSE, METHODS, PLAIN, TRACKING, Config, settings_of
from experiments.language_modeling.corpora import Corpora


def build_model(config: Config, mesh: Mesh | None = None) -> Transformer:
    """The main model; given the mesh that its state is split over, one that gathers its scanned blocks one by one."""
    m = config.model
    shape = dataclasses.replace(SIZES[m.size], dtype=jnp.dtype(m.dtype), remat=m.remat, scan_layers=m.scan_layers)
    if any(settings_of(config, method)["derivatives"] == "forward" for method in METHODS):
        shape = dataclasses.replace(shape, attention="xla")  # fused kernels have no forward mode
    return Transformer(shape, mesh if _gathers_blocks(config, mesh) else None)


def _gathers_blocks(config: Config, mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.size > 1 and config.shard_state and config.model.scan_layers


def gathered(config: Config, mesh: Mesh | None) -> Callable[[str], bool] | None:
    """The `gather` of a step with the model of `build_model`."""
    return gathered_before if _gathers_blocks(config, mesh) else None


def build_weighting(config: Config) -> ConvWeighting | NGramWeighting:
    """The weighting network's module."""
    m = config.model
    if m.weighting == "conv":
        return ConvWeighting(layers=m.weighting_layers, width=m.weighting_width)
    return NGramWeighting(width=m.weighting_width, hidden=m.weighting_width)


class Weighting(NamedTuple):
    """What scores or weighs rows."""

    init: Callable[[Array], Params]
    """Random key -> α."""
    logits: LogitFn | Scorer | None
    """None for a method without a weighting network."""


def weighting_of(config: Config, method: str, loss: LossFn) -> Weighting:
    """The weighting network of a method: over bytes, over losses, or none."""
    if method == "learning_to_reweight":
        return Weighting(lambda key: {}, None)
    if method == "meta_weight_net":
        net = bilevel.meta_weight_net(loss)
        return Weighting(net.init, net.scorer)
    module = build_weighting(config)
    tokens, length = jnp.zeros((1, config.length), jnp.uint8), jnp.full((1,), config.length, jnp.int32)
    return Weighting(lambda key: module.init(key, tokens, length)["params"], logit_fn(module))


def build_step(
    config: Config, method: str, model: Transformer, loss: LossFn, weighting: Weighting, mesh: Mesh | None = None
) -> TrainStep:
    """The train step of a method."""
    s = settings_of(config, method)
    horizon = config.schedule_steps or config.steps
    warmup = min(config.warmup, horizon // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, horizon)
    derivatives: Derivatives = bilevel.Forward() if s["derivatives"] == "forward" else bilevel.Finite()
    return make_step(
        loss,
        weighting.logits,
        optax.adam(schedule, b2=0.98),
        build_weight_optimizer(s),
        build_method(method, s),
        batch_size=config.batch_size,
        mode="dense" if method in DENSE else "sparse",
        filter=None if method in PLAIN else build_filter(s),
        derivatives=derivatives,
        param_filter=last_blocks(s["probe_blocks"], model.config),
        estimator=s["estimator"],
        alpha_batch=s["alpha_batch"],
        alpha_batch_size=s["alpha_batch_size"],
        update_every=s["update_every"],
        probe_every=s["probe_every"] or None,
        normalize_alignments=s["normalize_alignments"],
        micro_batches=config.micro_batches,
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
        gather=gathered(config, mesh),
    )


def build_weight_optimizer(settings: dict[str, Any]) -> optax.GradientTransformation:
    """Adam for α, with a warm-up that is counted in θ-updates.

    Raises:
      UserError: if that is below 0.
    """
    if settings["weight_warmup"] < 0:
        raise UserError(f"--weights.weight-warmup {settings['weight_warmup']} must be at least 0.")
    rate, updates = settings["weight_learning_rate"], settings["weight_warmup"] // settings["update_every"]
    schedule = optax.linear_schedule(0.0, rate, updates) if updates else rate
    return optax.adamw(schedule, weight_decay=settings["weight_decay"])


def last_blocks(count: int, model: TransformerConfig) -> Callable[[str], bool] | None:
    """Accepts the parameters of the last `count` of the transformer's blocks and of the norm behind them; None (all) for 0.

    Raises:
      UserError: if the model has no such blocks.
    """
    if count == 0:
        return None
    if not 0 < count <= model.layers:
        raise UserError(
            f"--weights.probe-blocks {count}: the model has {model.layers} blocks; give 0 to {model.layers}."
        )
    if model.scan_layers:
        raise UserError(
            f"--weights.probe-blocks {count} does not go with --model.scan-layers, which stacks the parameters of all blocks: "
            "leave one of them away."
        )
    first = model.layers - count
    chosen = ("final_norm/", *(f"block_{i}/" for i in range(first, model.layers)))
    return lambda path: path.startswith(chosen)


def build_filter(settings: dict[str, Any]) -> filters.Filter:
    """The filter that the settings name."""
    if settings["filter"] == "uniform":
        return filters.uniform()
    if settings["filter"] == "top_fraction":
        return filters.top_fraction(settings["top_fraction"])
    if settings["filter"] == "threshold":
        return filters.threshold(settings["threshold"])
    factory = {"gumbel_top_k": filters.gumbel_top_k, "importance": filters.importance, "top_k": filters.top_k}
    return factory[settings["filter"]](
        temperature=settings["temperature"], min_effective_fraction=settings["min_effective_fraction"]
    )


def build_method(method: str, settings: dict[str, Any]) -> methods.Method:
    """The method with its settings."""
    if method in TRACKING:
        rate = settings["tracker_learning_rate"]
        trackers = {
            "sgd": optax.sgd(rate),
            "momentum": optax.sgd(rate, momentum=0.9),
            "adam": optax.adam(rate, b2=0.98),
        }
        tracker = trackers[settings["tracker"]]
        if method == "penalty":
            return methods.penalty(tracker, strength=settings["penalty_strength"])
        return methods.soba(tracker, damping=settings["damping"])
    if method == "dds":
        return methods.dds(average_specific=settings["average_specific"])
    if method == "anograd":
        return methods.anograd(
            average_specific=settings["average_specific"], through_optimizer=settings["through_optimizer"]
        )
    average = settings["average_specific"]
    implicit = {"iterations": settings["iterations"], "damping": settings["damping"], "average_specific": average}
    makers: dict[str, Callable[[], methods.Method]] = {
        "uniform": methods.uniform,
        "mixing": methods.uniform,
        "contrastive": methods.uniform,
        "frozen": methods.frozen,
        "classifier": methods.frozen,
        "meta_weight_net": lambda: methods.dds(average_specific=average),
        "learning_to_reweight": methods.learning_to_reweight,
        "implicit_cg": lambda: methods.implicit_cg(**implicit),
        "implicit_neumann": lambda: methods.implicit_neumann(step_size=settings["neumann_step_size"], **implicit),
    }
    return makers[method]()


def build_loaders(
    config: Config, method: str, seed: int, corpora: Corpora, rows: RowView | None = None
) -> tuple[Loader | MixedLoader, Loader | TaskLoader]:
    """Loaders of the big batches and of the specific batches. Methods that pick no rows load only those they train on.

    Args:
      config: of the experiment.
      method: its name.
      seed: of the run.
      corpora: the data.
      rows: the generic rows; None: all training rows.
    """
    size, settings = _loaded_rows(config, method), settings_of(config, method)
    loader = functools.partial(Loader, process_index=jax.process_index(), process_count=jax.process_count())
    specific = functools.partial(loader, corpora.specific["train"])
    count = _specific_rows(method, settings, size)
    generic = loader(corpora.generic_train if rows is None else rows, size - count, seed=seed)
    if count:
        generic = MixedLoader(generic, specific(count, seed=seed + 4_000_003))
    train, specific_seed = corpora.specific["train"], seed + 1_000_003
    if isinstance(train, JoinedData):
        weights = corpora.task_weights
        size = settings["specific_batch_size"]
        return generic, TaskLoader(train, size, seed=specific_seed, weights=weights, **loader.keywords)
    return generic, specific(settings["specific_batch_size"], seed=specific_seed)


def check_rows(config: Config, methods: Sequence[str]) -> None:
    """Checks, before any method trains, that the specific rows in the loaded batches go with all methods and processes.

    Raises:
      UserError: if they do not.
    """
    for method in methods:
        _specific_rows(method, settings_of(config, method), _loaded_rows(config, method))


def _loaded_rows(config: Config, method: str) -> int:
    """The rows in a loaded batch.

    Raises:
      UserError: if they are too few to pick from.
    """
    size = config.batch_size if method in (*PLAIN, *DENSE) else config.big_batch_size
    if size < config.batch_size:
        raise UserError(
            f"--big-batch-size {size} is smaller than --batch-size {config.batch_size}: "
            "the filter picks the batch from the big batch, so give a larger big batch."
        )
    return size


def _specific_rows(method: str, settings: dict[str, Any], size: int) -> int:
    """The specific rows among `size` loaded ones.

    Raises:
      UserError: if they leave no generic row.
    """
    if method == "mixing":
        return mixed_rows(settings["mixing_fraction"], size, jax.process_count())
    count = 0 if method in (*PLAIN, *DENSE) else settings["specific_candidates"]
    if not 0 <= count < size:
        raise UserError(f"--weights.specific-candidates {count} of --big-batch-size {size}: give 0 or more, and fewer.")
    if count % jax.process_count():
        raise UserError(
            f"--weights.specific-candidates {count} cannot be divided among {jax.process_count()} processes: give a multiple."
        )
    return count


def mixed_rows(fraction: float, batch_size: int, processes: int = 1) -> int:
    """The specific rows in a batch of `mixing`: as many for every process, and at least one of either kind.

    Raises:
      UserError: for a fraction out of range, or a batch too small.
    """
    if not 0 < fraction < 1 or batch_size < 2 * processes:
        raise UserError(
            f"--weights.mixing-fraction {fraction} of --batch-size {batch_size}: give a fraction between 0 and 1, and at "
            f"least two rows{' a process' if processes > 1 else ''}."
        )
    each = math.ceil(round(fraction * batch_size) / processes)
    return processes * min(max(each, 1), batch_size // processes - 1)


def init_state(
    config: Config, seed: int, step: TrainStep, model: Transformer, weighting: Weighting, mesh: Mesh
) -> tuple[TrainState, TrainStep]:
    """The initial state, born on all devices of the mesh; the same main model for every method of a seed.

    Returns:
      The state, and the step that keeps it where it lies.
    """
    model_key, weight_key, step_key = jax.random.split(jax.random.key(seed), 3)
    tokens = jnp.zeros((1, config.length), jnp.uint8)

    def create() -> TrainState:
        params = model.init(model_key, tokens)["params"]
        return step.init(step_key, params, weighting.init(weight_key))

    return placed(config, mesh, step, create)


def placed(
    config: Config, mesh: Mesh, step: TrainStep, create: Callable[..., TrainState], *arguments: Any
) -> tuple[TrainState, TrainStep]:
    """The state that `create` makes of the arguments, on all devices of the mesh, and the step that keeps it where it lies."""
    if not config.shard_state:
        where = sharding.replicated(mesh) if mesh.size > 1 else None
        return jax.jit(create, out_shardings=where)(*arguments), step
    where = sharding.split_state(mesh, jax.eval_shape(create, *arguments))
    return jax.jit(create, out_shardings=where)(*arguments), step.map(sharding.keep_sharding(where))
