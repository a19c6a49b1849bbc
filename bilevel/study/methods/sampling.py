"""Methods whose sampler picks rows by their numbers, from data on the device (RLSampler)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel import methods, samplers
from bilevel.data import digest, rows_hash
from bilevel.nn.head import with_head
from bilevel.study import drawn
from bilevel.study.config import free
from bilevel.study.context import Context
from bilevel.study.spec import Log, Plan, Spec, no_weighting
from bilevel.study.task import ModelOptions
from bilevel.training import SequenceRecorder, load_sampler, load_sequence, save_sampler, save_sequence
from bilevel.types import UserError

SEQUENCE = "sequence.safetensors"
SAMPLER = "sampler.safetensors"
DRAWN = "sequence.part"
"""The sequence while training."""


@dataclass(frozen=True)
class RlSampler:
    """RLSampler: a policy over all training rows, learned by REINFORCE from the valid loss."""

    policy_every: int = 100
    """θ-updates for each update of the policy (T1 of the paper)."""
    reward_every: int = 20
    """θ-updates for each reward, the loss on all specific rows (T2 of the paper); divides policy-every."""
    reward_parts: int = 1
    """Evaluate the specific rows in this many equal parts, one after the other (the paper: 5)."""
    reward_scale: float = 2.0
    """The 2 in the reward exp(−2·loss)."""
    baseline_rate: float = 0.1
    """Share of the newest reward in the baseline (λ of the paper)."""
    initial_baseline: float | None = None
    """The baseline before the first reward; none given: that reward."""
    policy_learning_rate: float = 0.04
    """Learning rate of the policy (Adam)."""
    summary_size: int = 64
    """Length of the summary that the policy draws by."""
    logger_size: int = 256
    """Units of each of the two cells of the history logger."""
    policy_size: int = 64
    """Units of each of the two cells of the policy."""
    start_from: Path | None = free(None)
    """Begin with the policy that another run learned: its directory, or the file sampler.safetensors there."""
    fixed: bool = False
    """Leave that policy as it is (the paper's fixed RLSampler)."""
    other_data: bool = False
    """Take a policy of other data with as many rows (the same images with other labels)."""


@dataclass(frozen=True)
class Replayed:
    """The rows that another run drew, in its order."""

    sequence: Path | None = free(None)
    """Its directory (RUN_DIR/rl_sampler-seed0), or the file sequence.safetensors there."""
    other_data: bool = False
    """Take a sequence of other data with as many rows."""


def _plan(context: Context, sampler: samplers.Sampler, learned: bool, parts: int = 1, start: Any = None) -> Plan:
    study, splits = context.study, context.splits
    if study.resident == "never":
        raise UserError(
            "--resident never does not fit rl_sampler and replayed, whose data always lie on the device: omit it."
        )
    if jax.process_count() > 1:
        raise UserError("rl_sampler and replayed run in one process: omit --hosts.coordinator, or these methods.")
    model = context.model(ModelOptions())
    model = model._replace(loss=with_head(model.loss))  # what the sampler observes

    def recorder(folder: Path) -> SequenceRecorder:
        ids = splits.train.rows(np.arange(len(splits.train)))["id"]
        return SequenceRecorder(folder / DRAWN, study.batch_size, ids)

    def finish(folder: Path, state: Any) -> Mapping[str, float]:
        about = {"content_hash": rows_hash(splits.train), "num_rows": len(splits.train)}
        sequence = recorder(folder).sequence()
        save_sequence(folder / SEQUENCE, sequence, **about)
        if learned:
            save_sampler(folder / SAMPLER, state.sampler.params, **about)
        found = drawn.save_frequencies(folder, sequence, splits)
        (folder / DRAWN).unlink(missing_ok=True)
        return found

    return Plan(
        model=model, method=methods.uniform(), weighting=no_weighting(), sampler=sampler, reward_parts=parts,
        sampler_params=start, recorder=recorder, finish=finish,
    )  # fmt: skip


def _rl_sampler(s: RlSampler, context: Context) -> Plan:
    study, splits = context.study, context.splits
    if s.fixed and s.start_from is None:
        raise UserError("--rl-sampler.fixed keeps a policy that was learned: say where by --rl-sampler.start-from.")
    if s.reward_every < 1 or s.policy_every < 1 or s.policy_every % s.reward_every:
        raise UserError(
            f"--rl-sampler.reward-every {s.reward_every} must divide --rl-sampler.policy-every {s.policy_every}, both at "
            "least 1."
        )
    if s.reward_parts < 1 or len(splits.specific) % s.reward_parts:
        raise UserError(
            f"--rl-sampler.reward-parts {s.reward_parts} does not divide the {len(splits.specific)} specific rows: choose a "
            "divisor, or another number of rows."
        )
    sampler = samplers.rl_sampler(
        len(splits.train), study.batch_size, splits.classes,
        update_every=s.policy_every, reward_every=s.reward_every, summary_size=s.summary_size, logger_size=s.logger_size,
        policy_size=s.policy_size, reward_scale=s.reward_scale, baseline_rate=s.baseline_rate,
        initial_baseline=s.initial_baseline, learning_rate=s.policy_learning_rate, learns=not s.fixed,
    )  # fmt: skip
    start: Callable[[], Any] | None = None
    identity: dict[str, str] = {}
    if s.start_from is not None:
        template = jax.eval_shape(sampler.init, jax.random.key(0)).params
        found = load_sampler(
            _file(s.start_from, SAMPLER),
            template,
            content_hash=_hash(s.other_data, context),
            num_rows=len(splits.train),
        )
        start = lambda: found  # noqa: E731 (a value that is known already)
        identity = {"policy_digest": digest(np.asarray(x).tobytes() for x in jax.tree.leaves(found))}
    return dataclasses.replace(_plan(context, sampler, True, s.reward_parts, start), identity=identity)


def _replayed(s: Replayed, context: Context) -> Plan:
    if s.sequence is None:
        raise UserError("The method replayed needs --replayed.sequence RUN_DIR/rl_sampler-seed0: say what to replay.")
    sequence = _sequence(s.sequence, s.other_data, context)
    sampler = samplers.replayed(sequence, len(context.splits.train), num_steps=context.study.steps)
    identity = {"sequence_digest": digest([sequence.tobytes()])}
    return dataclasses.replace(_plan(context, sampler, False), identity=identity)


def _sequence(given: Path, other_data: bool, context: Context) -> NDArray[np.int32]:
    file, size = _file(given, SEQUENCE), context.study.batch_size
    found = load_sequence(file, content_hash=_hash(other_data, context), num_rows=len(context.splits.train))
    if found.shape[1] != size:
        raise UserError(
            f"The sequence in {file} has {found.shape[1]} rows a step, but --batch-size is {size}: make them equal."
        )
    return found


def _hash(other_data: bool, context: Context) -> str | None:
    return None if other_data else rows_hash(context.splits.train)


def _file(given: Path, name: str) -> Path:
    """The file itself, or the one with this name in the directory of a run."""
    return given / name if given.is_dir() else given


SPECS: dict[str, Spec] = {
    "rl_sampler": Spec(
        RlSampler, _rl_sampler, {"learning_rate": Log(1e-3, 8e-3)}, {"reward_parts": 5},
        needs_labels=True,
    ),
    "replayed": Spec(Replayed, _replayed, in_all=False),
}  # fmt: skip
