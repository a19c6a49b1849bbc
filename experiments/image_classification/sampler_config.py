"""The flags of the methods whose sampler picks rows by their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of rl_sampler and replayed."""

    policy_every: int = 100
    """rl_sampler: θ-updates for each update of the policy (T1 of the paper)."""
    reward_every: int = 20
    """rl_sampler: θ-updates for each reward, the loss on all dev rows (T2 of the paper); divides --weights.policy-every."""
    reward_parts: int = 1
    """rl_sampler: evaluate the dev rows in this many equal parts, one after the other (the paper: 5)."""
    reward_scale: float = 2.0
    """rl_sampler: the 2 in the reward exp(−2·loss)."""
    baseline_rate: float = 0.1
    """rl_sampler: share of the newest reward in the baseline (λ of the paper)."""
    initial_baseline: float | None = None
    """rl_sampler: the baseline before the first reward; none given: that reward."""
    policy_learning_rate: float = 0.04
    """rl_sampler: learning rate of the policy (Adam)."""
    summary_size: int = 64
    """rl_sampler: length of the summary that the policy draws by."""
    logger_size: int = 256
    """rl_sampler: units of each of the two cells of the history logger."""
    policy_size: int = 64
    """rl_sampler: units of each of the two cells of the policy."""
    sampler_from: Path | None = None
    """rl_sampler: begin with the policy that another run learned: its directory (RUN_DIR/rl_sampler-seed0), or the file
    sampler.safetensors there."""
    fixed_sampler: bool = False
    """rl_sampler: leave that policy as it is (the paper's fixed RLSampler)."""
    sequence_from: Path | None = None
    """replayed: draw what another run drew: its directory (RUN_DIR/rl_sampler-seed0), or the file sequence.safetensors there."""
    other_data: bool = False
    """Take such a policy or sequence also if it belongs to other data with as many rows (the same images with other labels)."""
