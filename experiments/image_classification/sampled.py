"""Runs whose sampler picks the rows: RLSampler, learned anew or from another run, and sequences that are replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel import samplers
from bilevel.data import rows_hash
from bilevel.nn.head import with_head
from bilevel.step.sampled import SampledFn, SampledState, SampledStep, make_sampled_step
from bilevel.training import SequenceRecorder, load_sampler, load_sequence, save_sampler, save_sequence
from bilevel.types import Array, Batch, Metrics, UserError
from experiments.image_classification.build import Losses, optimizer_of
from experiments.image_classification.config import Config
from experiments.image_classification.data import ImageData
from experiments.image_classification.drawn import save_frequencies

SEQUENCE = "sequence.safetensors"
SAMPLER = "sampler.safetensors"
DRAWN = "sequence.part"
"""The sequence while training."""


def check(config: Config, method: str, data: ImageData) -> None:
    """Refuses what `build_sampler` and `first_policy` refuse, before anything is trained."""
    first_policy(config, method, data, build_sampler(config, method, data))


def build_sampler(config: Config, method: str, data: ImageData) -> samplers.Sampler:
    """The sampler of a method over the training rows.

    Raises:
      UserError: for flags that do not go together, or a sequence that cannot be replayed.
    """
    w = config.weights
    if method == "replayed":
        return samplers.replayed(_sequence(config, data), len(data.train), num_steps=config.steps)
    if w.fixed_sampler and w.sampler_from is None:
        raise UserError("--weights.fixed-sampler keeps a policy that was learned: say where by --weights.sampler-from.")
    if w.reward_every < 1 or w.policy_every < 1 or w.policy_every % w.reward_every:
        raise UserError(
            f"--weights.reward-every {w.reward_every} must divide --weights.policy-every {w.policy_every}, both at least 1."
        )
    if w.reward_parts < 1 or len(data.dev) % w.reward_parts:
        raise UserError(
            f"--weights.reward-parts {w.reward_parts} does not divide the {len(data.dev)} dev rows: choose a divisor, or "
            "another number of rows by --data.dev."
        )
    return samplers.rl_sampler(
        len(data.train),
        config.batch_size,
        data.classes,
        update_every=w.policy_every,
        reward_every=w.reward_every,
        summary_size=w.summary_size,
        logger_size=w.logger_size,
        policy_size=w.policy_size,
        reward_scale=w.reward_scale,
        baseline_rate=w.baseline_rate,
        initial_baseline=w.initial_baseline,
        learning_rate=w.policy_learning_rate,
        learns=not w.fixed_sampler,
    )


def first_policy(config: Config, method: str, data: ImageData, sampler: samplers.Sampler) -> Any:
    """What --weights.sampler-from holds; None without it.

    Raises:
      UserError: the file is missing, or belongs to other data or other sizes.
    """
    given = config.weights.sampler_from
    if method != "rl_sampler" or given is None:
        return None
    template = jax.eval_shape(sampler.init, jax.random.key(0)).params
    return load_sampler(_file(given, SAMPLER), template, content_hash=_hash(config, data), num_rows=len(data.train))


def build_step(config: Config, sampler: samplers.Sampler, losses: Losses) -> SampledStep:
    """The iteration; the reward's loss is that of training, augmentation and BatchNorm included (appendix B)."""
    return make_sampled_step(
        sampler,
        with_head(losses.train),
        optimizer_of(config, config.steps),
        validation_loss=losses.train,
        validation_micro_batches=config.weights.reward_parts,
        micro_batches=config.micro_batches,
        ema_decay=config.average or None,
    )


def observed(step: SampledFn, observe: Callable[[Batch, dict[str, Any]], dict[str, Array]]) -> SampledFn:
    """The same step with more metrics: `observe(data, metrics)` -> scalars."""

    def watched(state: SampledState, data: Batch, validation: Batch) -> tuple[SampledState, Metrics]:
        state, metrics = step(state, data, validation)
        return state, {**metrics, **observe(data, dict(metrics))}

    return watched


def recorder(config: Config, directory: Path) -> SequenceRecorder:
    """What keeps the rows drawn while training."""
    return SequenceRecorder(directory / DRAWN, config.batch_size)


def save_results(config: Config, directory: Path, state: SampledState, data: ImageData) -> dict[str, float]:
    """Keeps the sequence and what the sampler learned for other runs; returns what `save_frequencies` does."""
    rows = {"content_hash": rows_hash(data.train), "num_rows": len(data.train)}
    sequence = recorder(config, directory).sequence()
    save_sequence(directory / SEQUENCE, sequence, **rows)
    params = getattr(state.sampler, "params", None)
    if params is not None:
        save_sampler(directory / SAMPLER, params, **rows)
    return save_frequencies(directory, sequence, data)


def _sequence(config: Config, data: ImageData) -> NDArray[np.int32]:
    given = config.weights.sequence_from
    if given is None:
        raise UserError(
            "The method replayed needs --weights.sequence-from RUN_DIR/rl_sampler-seed0: say what to replay."
        )
    file = _file(given, SEQUENCE)
    found = load_sequence(file, content_hash=_hash(config, data), num_rows=len(data.train))
    if found.shape[1] != config.batch_size:
        raise UserError(
            f"The sequence in {file} has {found.shape[1]} rows a step, but --batch-size is {config.batch_size}: make them equal."
        )
    return found


def _hash(config: Config, data: ImageData) -> str | None:
    return None if config.weights.other_data else rows_hash(data.train)


def _file(given: Path, name: str) -> Path:
    """The file itself, or the one with this name in the directory of a run."""
    return given / name if given.is_dir() else given
