"""What the settings of each method are where the user gives none."""

from __future__ import annotations

from typing import Any

PAPER: dict[str, Any] = {
    "estimator": "softmax",
    "alpha_batch": "filtered",
    "alpha_batch_size": 0,
    "specific_batch_size": 0,  # as many as --batch-size
    "update_every": 1,
    "probe_every": 0,
    "probe_blocks": 0,
    "derivatives": "forward",
    "normalize_alignments": False,
    "weight_learning_rate": 1e-3,
    "weight_warmup": 0,
    "weight_decay": 0.0,
    "temperature": 1.0,
    "min_effective_fraction": 0.0,
    "filter": "gumbel_top_k",
    "top_fraction": 0.1,
    "threshold": 0.0,
    "average_specific": 0.0,
    "through_optimizer": False,
    "tracker": "adam",
    "tracker_learning_rate": 2e-3,
    "penalty_strength": 1.0,
    "damping": 0.0,
    "iterations": 5,
    "neumann_step_size": 0.1,
    "mixing_fraction": 0.25,  # where `search` has not chosen it on valid
    "specific_candidates": 0,
    "classifier_steps": 1000,
    "classifier_rows": 256,
    "contrastive_start": 0.5,
    "contrastive_finetune_steps": 500,
    "contrastive_rows": 131_072,
    "contrastive_fraction": 0.1,
    "contrastive_scores": None,
    "warm_start": False,
}
"""The ATD paper's settings (sections 4.2, 4.3 and 6.2), with the prototype's learning rates where it is silent."""

DEFAULT: dict[str, Any] = PAPER | {
    "estimator": "score",
    "update_every": 1,
    "probe_every": 2,
    "probe_blocks": 1,
    "derivatives": "finite",
    "normalize_alignments": True,
    "weight_learning_rate": 1e-2,
    "contrastive_fraction": 0.03,
}
"""Tuned on validation data; `benchmarks/RESULTS.md` has the measurements."""

RATES: dict[str, float] = {"score": DEFAULT["weight_learning_rate"], "softmax": PAPER["weight_learning_rate"]}
"""The weight rate that goes with an estimator, where it is not the preset's. With `softmax` at the rate of `score` the effective
sample size collapses within 100 steps, and that estimator, which weighs each row by its weight, then learns nothing more."""

_DENSE: dict[str, Any] = {"estimator": "softmax", "probe_every": 0, "probe_blocks": 0, "update_every": 1}
_IMPLICIT: dict[str, Any] = {"update_every": 4, "probe_every": 0, "average_specific": 0.9, "damping": 1.0}
_WARM: dict[str, Any] = {"warm_start": True, "weight_learning_rate": 3e-3}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "soba": DEFAULT,
        "warm_soba": DEFAULT | _WARM,
        "penalty": DEFAULT,
        "dds": DEFAULT | {"average_specific": 0.95},
        "anograd": DEFAULT | {"average_specific": 0.95, "through_optimizer": True},
        "uniform": DEFAULT,
        "mixing": DEFAULT,
        "contrastive": DEFAULT,
        "frozen": DEFAULT,
        "classifier": DEFAULT | {"filter": "top_k"},
        "implicit_cg": DEFAULT | _IMPLICIT,
        "implicit_neumann": DEFAULT | _IMPLICIT,
        "learning_to_reweight": DEFAULT | _DENSE | {"normalize_alignments": False},
        "meta_weight_net": DEFAULT | _DENSE | {"average_specific": 0.95},
    },
    "paper": {
        "soba": PAPER,
        "warm_soba": PAPER | {"warm_start": True},
        "penalty": PAPER,
        "dds": PAPER | {"alpha_batch": "uniform"},
        "anograd": PAPER | {"alpha_batch": "uniform"},
        "uniform": PAPER,
        "mixing": PAPER,
        "contrastive": PAPER,
        "frozen": PAPER,
        "classifier": PAPER | {"filter": "top_k"},
        "implicit_cg": PAPER | {"damping": 1.0},
        "implicit_neumann": PAPER | {"damping": 1.0},
        "learning_to_reweight": PAPER,
        "meta_weight_net": PAPER,
    },
}
