"""Methods whose sampler picks rows by their numbers, from data on the device (RLSampler)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import NonNegativeFloat

from bilevel import samplers
from bilevel.data import digest, rows_hash
from bilevel.study.context import Context
from bilevel.study.sampled import SAMPLER, SEQUENCE, sampled_plan
from bilevel.study.spec import Plan, Spec, labels
from bilevel.training import load_sampler, load_sequence
from bilevel.training.settings import Count, free
from bilevel.types import UserError


@dataclass(frozen=True)
class RlSampler:
    """RLSampler: a policy over all training rows, learned by REINFORCE from the valid loss."""

    policy_every: Count = 100
    """θ-updates for each update of the policy (T1 of the paper)."""
    reward_every: Count = 20
    """θ-updates for each reward, the loss on all specific rows (T2 of the paper); divides policy-every."""
    reward_parts: Count = 1
    """Evaluate the specific rows in this many equal parts, one after the other (the paper: 5)."""
    reward_scale: float = 2.0
    """The 2 in the reward exp(−2·loss)."""
    baseline_rate: float = 0.1
    """Share of the newest reward in the baseline (λ of the paper)."""
    initial_baseline: float | None = None
    """The baseline before the first reward; none given: that reward."""
    policy_learning_rate: float = 0.04
    """Learning rate of the policy (Adam)."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Weight of the policy's entropy beside the rewards: keeps it from ending on one row; 0: none, as in the paper."""
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


def _rl_sampler(s: RlSampler, context: Context) -> Plan:
    splits = context.splits
    if s.fixed and s.start_from is None:
        raise UserError("--rl-sampler.fixed keeps a policy that was learned: say where by --rl-sampler.start-from.")
    if s.policy_every % s.reward_every:
        raise UserError(
            f"--rl-sampler.reward-every {s.reward_every} must divide --rl-sampler.policy-every {s.policy_every}."
        )
    if len(splits.specific) % s.reward_parts:
        raise UserError(
            f"--rl-sampler.reward-parts {s.reward_parts} does not divide the {len(splits.specific)} specific rows: choose a "
            "divisor, or another number of rows."
        )
    sampler = samplers.rl_sampler(
        len(splits.train), context.study.batch_size, splits.classes,
        update_every=s.policy_every, reward_every=s.reward_every, summary_size=s.summary_size, logger_size=s.logger_size,
        policy_size=s.policy_size, reward_scale=s.reward_scale, baseline_rate=s.baseline_rate,
        initial_baseline=s.initial_baseline, entropy_bonus=s.entropy_bonus, learning_rate=s.policy_learning_rate,
        learns=not s.fixed,
    )  # fmt: skip
    policy, identity = None, {}
    if s.start_from is not None:
        template = jax.eval_shape(sampler.init, jax.random.key(0)).params
        policy = load_sampler(_file(s.start_from, SAMPLER), template, **_expected(s, context))
        identity = {"policy_digest": digest(np.asarray(x).tobytes() for x in jax.tree.leaves(policy))}
    mend = (
        "give another policy by --rl-sampler.start-from"
        if s.fixed
        else "raise --rl-sampler.entropy-bonus or lower --rl-sampler.policy-learning-rate"
    )
    return sampled_plan(
        context,
        sampler,
        parts=s.reward_parts,
        begin=policy and (lambda: policy),
        learned=True,
        identity=identity,
        if_narrow=mend,
    )


def _replayed(s: Replayed, context: Context) -> Plan:
    if s.sequence is None:
        raise UserError("The method replayed needs --replayed.sequence RUN_DIR/rl_sampler-seed0: say what to replay.")
    study, file = context.study, _file(s.sequence, SEQUENCE)
    sequence = load_sequence(file, **_expected(s, context))
    if (found := sequence.shape[1]) != study.batch_size:
        raise UserError(
            f"The sequence in {file} has {found} rows a step, but --batch-size is {study.batch_size}: make them equal."
        )
    sampler = samplers.replayed(sequence, len(context.splits.train), num_steps=study.steps)
    identity = {"sequence_digest": digest([sequence.tobytes()])}
    return sampled_plan(context, sampler, identity=identity)


def _expected(s: RlSampler | Replayed, context: Context) -> dict[str, Any]:
    """The data that a file of another run must be of."""
    train = context.splits.train
    return {"content_hash": None if s.other_data else rows_hash(train), "num_rows": len(train)}


def _file(given: Path, name: str) -> Path:
    """The file itself, or the one with this name in the directory of a run."""
    return given / name if given.is_dir() else given


SPECS: dict[str, Spec] = {
    "rl_sampler": Spec(RlSampler, _rl_sampler, paper={"reward_parts": 5}, lacks=labels),
    "replayed": Spec(Replayed, _replayed, {}, in_all=False),
}
