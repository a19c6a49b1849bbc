"""What is refused before anything is trained: flags, data and methods that do not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax

from bilevel.devices import sharding
from bilevel.nn.classification import init_variables
from bilevel.types import UserError
from experiments.cli import flag_of
from experiments.image_classification import build, known, sampled
from experiments.image_classification.config import DENSE, SAMPLED, SELECTING, TABLED, Config
from experiments.image_classification.data import ImageData
from experiments.image_classification.model import model_of


def check_flags(config: Config, methods: Sequence[str]) -> None:
    """Refuses flags that are not possible with any data.

    Raises:
      UserError: naming the first such flag.
    """
    for name in ("seeds", "steps", "batch_size", "evaluate_every", "micro_batches"):
        _at_least(1, name, getattr(config, name))
    _at_least(0, "warmup", config.warmup)
    _at_least(1, "model.width", config.model.width)
    _at_least(1, "weights.il_steps", config.weights.il_steps)
    _check_schedule(config)
    if any(not 0 < target <= 1 for target in config.targets):
        raise UserError(f"--targets {' '.join(map(str, config.targets))}: accuracies lie between 0 and 1.")
    if not 0 <= config.average < 1:
        raise UserError(f"--average {config.average} must lie in [0, 1): it is a decay, and 0 averages nothing.")
    for method in SAMPLED:
        if method in methods and config.resident == "never":
            raise UserError(
                f"--resident never does not fit {method}, whose data always lie on the device: leave the flag away."
            )
    if "mentornet" in methods and not 0 <= config.weights.burn_in <= 1:
        raise UserError(f"--weights.burn-in {config.weights.burn_in} must lie in [0, 1]: it is a share of the steps.")
    if "svp" in methods and not 0 < config.weights.svp_fraction <= 1:
        raise UserError(f"--weights.svp-fraction {config.weights.svp_fraction} must lie in (0, 1].")
    if any(method in SELECTING for method in methods) and config.big_batch_size < config.batch_size:
        raise UserError(
            f"--big-batch-size {config.big_batch_size} is smaller than --batch-size {config.batch_size}: the batch is picked "
            "from the big batch, so give a larger big batch."
        )


def _check_schedule(config: Config) -> None:
    given = " ".join(map(str, config.milestones))
    if (config.schedule == "step") != bool(config.milestones):
        found = (
            f"--milestones {given} with --schedule {config.schedule}"
            if given
            else "--schedule step without --milestones"
        )
        raise UserError(f"{found}: give both, as in --schedule step --milestones 50000 75000, or neither.")
    if any(after <= before for before, after in pairwise((0, *config.milestones))):
        raise UserError(f"--milestones {given} must be numbers of steps from 1 on, each larger than the one before.")
    if config.decay <= 0:
        raise UserError(f"--decay {config.decay} must be positive: it multiplies the learning rate.")


def _at_least(least: int, name: str, value: Any) -> None:
    if value < least:
        raise UserError(f"{flag_of(name)} {value} must be at least {least}.")


def check_method(config: Config, method: str, data: ImageData) -> None:
    """Refuses what a run of the method would refuse after others have trained: it is built, and its sizes are compared.

    Raises:
      UserError: for sizes, networks, files or settings that do not fit.
    """
    _check_padding(config, data)
    model = model_of(config, method, data)
    _check_network(config, data, None)
    if method in SAMPLED:
        _check_parts({"batch_size": (config.batch_size, config.micro_batches)})
        sampled.check(config, method, data)
        return
    mesh = sharding.make_mesh()
    _check_sizes(config, method, data, mesh.size)
    if method in TABLED:
        _check_network(config, data, config.weights.il_network)
        known.check_irreducible(config, data)
    if method == "svp":
        _check_network(config, data, config.weights.svp_network)
    weighting = build.weighting_of(config, method, data, model.losses, {})
    build.build_step(config, method, data, model.losses, weighting, config.seed, mesh)


def _check_padding(config: Config, data: ImageData) -> None:
    d = config.data
    if d.augment == "none":
        return
    _at_least(0, "data.padding", d.padding)
    if d.padding_mode == "reflect" and d.padding >= min(data.shape[:2]):
        raise UserError(
            f"--data.padding {d.padding} with --data.padding-mode reflect must be smaller than the images, which have "
            f"{data.shape[0]} × {data.shape[1]} pixels."
        )


def _check_network(config: Config, data: ImageData, name: str | None) -> None:
    """Runs a network's initialisation without its arithmetic; it refuses inputs that are too small."""
    fresh = partial(init_variables, build.classifier(config, data, name), shape=data.shape)
    jax.eval_shape(fresh, jax.random.key(0))


def _check_sizes(config: Config, method: str, data: ImageData, devices: int) -> None:
    rows, parts = len(data.train), devices * config.micro_batches
    if config.batch_size > rows:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {rows} training rows: give a smaller one, or more data."
        )
    _check_parts(
        {
            "batch_size": (config.batch_size, parts),
            "big_batch_size": (build.loaded_rows(config, method, rows, devices), parts),
            "weights.dev_batch_size": (build.dev_rows(config, len(data.dev)), parts if method in DENSE else devices),
        }
    )


def _check_parts(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuses sizes, by the name of their flag, that their number of parts does not divide."""
    for name, (size, divisor) in sizes.items():
        if size % divisor:
            raise UserError(
                f"{flag_of(name)} {size} cannot be divided into {divisor} equal parts (devices, and --micro-batches on each): "
                f"choose a multiple of {divisor}."
            )
