"""What the methods' settings do: each variant trained for the first quarter of the README's comparison, valid loss.

    python -m benchmarks.tune_lm --data-dir DATA --run-dir runs/tune [--variants "soba; dds, no averaging"]

Prints a Markdown table. DATA holds lm/generic and lm/specific. Finished variants are not run again.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bilevel.study import resolve
from bilevel.study.config import Config
from bilevel.study.run import run
from bilevel.study.suite import opened
from bilevel.tasks.language_modeling import TASK, DataConfig, LanguageConfig, ModelConfig

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "soba": ("soba", {}),
    "soba, paper's settings": ("soba", {"preset": "paper"}),
    "soba, no entropy bonus": ("soba", {"entropy_bonus": 0.0}),
    "soba, entropy bonus 0.01": ("soba", {"entropy_bonus": 0.01}),
    "soba, entropy bonus 0.03": ("soba", {"entropy_bonus": 0.03}),
    "soba, entropy bonus 0.1": ("soba", {"entropy_bonus": 0.1}),
    "soba, entropy bonus 0.05, floor of 4 rows": ("soba", {"entropy_bonus": 0.05, "min_effective_fraction": 4 / 512}),
    "soba, entropy bonus 0.03, floor of 16 rows": ("soba", {"entropy_bonus": 0.03, "min_effective_fraction": 16 / 512}),
    "soba, forward": ("soba", {"derivatives": "forward"}),
    "soba, softmax": ("soba", {"estimator": "softmax", "weight_learning_rate": 1e-2}),
    "soba, alignments as they are": ("soba", {"normalize_alignments": False}),
    "soba, weight rate 1e-3": ("soba", {"weight_learning_rate": 1e-3}),
    "soba, weight rate 3e-3": ("soba", {"weight_learning_rate": 3e-3}),
    "soba, weight rate 3e-2": ("soba", {"weight_learning_rate": 3e-2}),
    "dds, weight rate 3e-2": ("dds", {"weight_learning_rate": 3e-2}),
    "anograd, weight rate 3e-2": ("anograd", {"weight_learning_rate": 3e-2}),
    "dds, weight rate 1e-1": ("dds", {"weight_learning_rate": 1e-1}),
    "dds, weight rate 3e-2, averaging 0.8": ("dds", {"weight_learning_rate": 3e-2, "average_specific": 0.8}),
    "soba, weight rate 3e-2, tracker rate 5e-3": (
        "soba",
        {"weight_learning_rate": 3e-2, "tracker_learning_rate": 5e-3},
    ),
    "soba, SGD tracker 0.05": ("soba", {"tracker": "sgd", "tracker_learning_rate": 0.05}),
    "soba, SGD tracker 0.05, damping 0.1": (
        "soba",
        {"tracker": "sgd", "tracker_learning_rate": 0.05, "damping": 0.1},
    ),
    "soba, tracker rate 5e-4": ("soba", {"tracker_learning_rate": 5e-4}),
    "soba, tracker rate 5e-3": ("soba", {"tracker_learning_rate": 5e-3}),
    "soba, damping 0.05": ("soba", {"damping": 0.05}),
    "soba, floor 0.01": ("soba", {"min_effective_fraction": 0.01}),
    "soba, floor 0.05": ("soba", {"min_effective_fraction": 0.05}),
    "soba, floor 0.03": ("soba", {"min_effective_fraction": 0.03}),
    "soba, weight decay 0.1": ("soba", {"weight_decay": 0.1}),
    "soba, weight decay 1": ("soba", {"weight_decay": 1.0}),
    "dds, weight decay 0.1": ("dds", {"weight_decay": 0.1}),
    "dds, weight decay 1": ("dds", {"weight_decay": 1.0}),
    "dds, forward": ("dds", {"derivatives": "forward"}),
    "dds, 64 specific rows": ("dds", {"specific_batch_size": 64}),
    "soba, 8 specific rows": ("soba", {"specific_batch_size": 8}),
    "soba, 64 specific rows": ("soba", {"specific_batch_size": 64}),
    "soba, 64 alpha rows": ("soba", {"alpha_batch_size": 64}),
    "dds": ("dds", {}),
    "dds, paper's settings": ("dds", {"preset": "paper"}),
    "dds, no averaging": ("dds", {"average_specific": 0.0}),
    "dds, averaging 0.98": ("dds", {"average_specific": 0.98}),
    "dds, uniform alpha rows": (
        "dds",
        {"alpha_batch": "uniform", "estimator": "softmax", "weight_learning_rate": 1e-2},
    ),
    "anograd": ("anograd", {}),
    "anograd, paper's settings": ("anograd", {"preset": "paper"}),
    "anograd, no averaging": ("anograd", {"average_specific": 0.0}),
    "anograd, uniform alpha rows": (
        "anograd",
        {"alpha_batch": "uniform", "estimator": "softmax", "weight_learning_rate": 1e-2},
    ),
    "anograd, 64 uniform alpha rows": (
        "anograd",
        {"alpha_batch": "uniform", "estimator": "softmax", "alpha_batch_size": 64, "weight_learning_rate": 1e-2},
    ),
    "soba, warm start": ("soba", {"warm_start": True}),
    "soba, warm start, weight rate 3e-3": ("soba", {"warm_start": True, "weight_learning_rate": 3e-3}),
    "soba, warm-up 200": ("soba", {"weight_warmup": 200}),
    "soba, warm-up 1000": ("soba", {"weight_warmup": 1000}),
    "soba, warm start, warm-up 300": ("soba", {"warm_start": True, "weight_warmup": 300}),
    "soba, warm start, warm-up 1000": ("soba", {"warm_start": True, "weight_warmup": 1000}),
    "soba, warm start, warm-up 2000": ("soba", {"warm_start": True, "weight_warmup": 2000}),
    "soba, warm start, top_k, warm-up 1000": (
        "soba",
        {
            "warm_start": True,
            "weight_warmup": 1000,
            "weight_learning_rate": 1e-2,
            "filter": "top_k",
            "estimator": "softmax",
        },
    ),
    "soba, warm start, weight rate 1e-3": ("soba", {"warm_start": True, "weight_learning_rate": 1e-3}),
    "soba, warm start, weight rate 3e-3, warm-up 1000": (
        "soba",
        {"warm_start": True, "weight_learning_rate": 3e-3, "weight_warmup": 1000},
    ),
    "soba, warm start, weight rate 1e-3, top_k": (
        "soba",
        {"warm_start": True, "weight_learning_rate": 1e-3, "filter": "top_k", "estimator": "softmax"},
    ),
    "soba, warm start, weight rate 3e-3, temperature 0.3": (
        "soba",
        {"warm_start": True, "weight_learning_rate": 3e-3, "temperature": 0.3},
    ),
    "warm_soba": ("warm_soba", {}),
    "warm_soba, 64 alpha rows": ("warm_soba", {"alpha_batch_size": 64}),
    "warm_soba, 64 uniform alpha rows": (
        "warm_soba",
        {"alpha_batch": "uniform", "alpha_batch_size": 64, "estimator": "softmax", "weight_learning_rate": 3e-3},
    ),
    "classifier, 12 specific candidates": ("classifier", {"specific_candidates": 12}),
    "soba, 12 specific candidates": ("soba", {"specific_candidates": 12}),
    "warm_soba, 12 specific candidates": ("warm_soba", {"specific_candidates": 12}),
    "dds, warm start": ("dds", {"warm_start": True}),
    "penalty": ("penalty", {}),
    "penalty, strength 0.1": ("penalty", {"strength": 0.1}),
    "penalty, strength 10": ("penalty", {"strength": 10.0}),
    "penalty, tracker rate 5e-4": ("penalty", {"tracker_learning_rate": 5e-4}),
    "classifier": ("classifier", {}),
    "classifier, top fraction 0.1": ("classifier", {"filter": "top_fraction"}),
    "classifier, weight rate 1e-3": ("classifier", {"weight_learning_rate": 1e-3}),
    "classifier, drawn": ("classifier", {"filter": "gumbel_top_k"}),
    "mixing": ("mixing", {"fraction": 0.1}),
    "mixing, 0.25": ("mixing", {"fraction": 0.25}),
    "mixing, 0.5": ("mixing", {"fraction": 0.5}),
    "mixing, 0.75": ("mixing", {"fraction": 0.75}),
    "contrastive": ("contrastive", {"fraction": 0.1}),
    "contrastive, start 0.25": ("contrastive", {"start": 0.25, "fraction": 0.1}),
    "contrastive, 0.03": ("contrastive", {"fraction": 0.03}),
    "implicit_cg": ("implicit_cg", {}),
    "implicit_cg, damping 0.1": ("implicit_cg", {"damping": 0.1}),
    "implicit_cg, damping 10": ("implicit_cg", {"damping": 10.0}),
    "implicit_cg, averaging 0.97": ("implicit_cg", {"average_specific": 0.97}),
    "implicit_neumann": ("implicit_neumann", {}),
    "implicit_neumann, step 1": ("implicit_neumann", {"step_size": 1.0, "damping": 0.1}),
    "implicit_neumann, averaging 0.97": ("implicit_neumann", {"average_specific": 0.97}),
    "meta_weight_net": ("meta_weight_net", {}),
    "meta_weight_net, weight rate 1e-3": ("meta_weight_net", {"weight_learning_rate": 1e-3}),
    "learning_to_reweight": ("learning_to_reweight", {}),
    "learning_to_reweight, 64 specific rows": ("learning_to_reweight", {"specific_batch_size": 64}),
    "soba, convolution": ("soba", {"weighting": "conv"}),
    "dds, convolution": ("dds", {"weighting": "conv"}),
}
"""Name -> (method, what differs from its preset)."""

# Which steps do what, named α every/specific rows every/blocks that are probed (0: all).
VARIANTS |= {
    f"{method} {update}/{probe}/{blocks}": (
        method,
        {"update_every": update, "probe_every": probe, "probe_blocks": blocks},
    )
    for method in ("soba", "dds", "anograd")
    for update, probe in ((1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 2), (2, 4), (2, 8), (4, 4), (8, 8))
    for blocks in (0, 1)
}


@dataclass(frozen=True)
class TuneConfig:
    """Short runs of many settings."""

    data_dir: Path
    """Folder that holds lm/generic and lm/specific."""
    run_dir: Path = Path("runs/tune")
    """Where the runs are kept."""
    specific: str = "rct_abstracts"
    """Specific set."""
    variants: str = ""
    """Names of variants, separated by semicolons; all by default."""
    steps: int = 1500
    """θ-updates, of a schedule of 6,000."""
    seed: int = 0
    """Seed."""


def main(options: TuneConfig) -> None:
    """Runs the variants and prints the table."""
    names = [name.strip() for name in options.variants.split(";") if name.strip()] or list(VARIANTS)
    print("| settings | specific valid loss | seconds | effective sample size |\n| --- | --- | --- | --- |")
    for name in names:
        config, method = _config(options, name)
        result = run(opened(config, TASK).context(method, options.seed))
        size = result.get("effective_sample_size", math.nan)
        print(f"| {name} | {result['valid_loss']:.3f} | {result['seconds']:.0f} | {size:.0f} |", flush=True)


def _config(options: TuneConfig, name: str) -> tuple[Config, str]:
    method, given = VARIANTS[name]
    preset, weighting = given.get("preset", "default"), given.get("weighting", "ngram")
    settings = {k: v for k, v in given.items() if k not in ("preset", "weighting")}
    folder = options.data_dir / "lm"
    data = DataConfig(
        generic=str(folder / "generic" / "train.txt.gz"), specific=str(folder / "specific" / options.specific)
    )
    config = resolve.default_config(TASK, preset).with_study(
        steps=options.steps,
        schedule_steps=6000,
        progress=False,
        evaluate_every=500,
        run_dir=options.run_dir / options.specific / name.replace(" ", "_").replace(",", ""),
    )
    config = config.with_method(method, dataclasses.replace(config.methods[method], **settings))
    return resolve.complete(
        dataclasses.replace(config, task=LanguageConfig(data, ModelConfig(weighting=weighting)))
    ), method


if __name__ == "__main__":
    main(tyro.cli(TuneConfig))
