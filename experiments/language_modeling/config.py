"""The flags of the language-modelling experiment, and the settings of its methods."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from bilevel.types import UserError
from experiments.cli import Residence, chosen_methods, flag_of
from experiments.language_modeling.presets import PRESETS, RATES

MethodName: TypeAlias = Literal[
    "uniform", "mixing", "contrastive", "classifier", "meta_weight_net", "learning_to_reweight", "dds", "anograd", "soba",
    "warm_soba", "penalty", "implicit_cg", "implicit_neumann", "frozen",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(MethodName)
ALL = tuple(name for name in METHODS if name != "frozen")
"""What `--compare all` means, in the order of the paper's table 2. The method frozen needs another run."""
PLAIN = ("uniform", "mixing", "contrastive")
"""They train on what is loaded: no weighting network."""
DENSE = ("learning_to_reweight", "meta_weight_net")
"""They weigh all rows of a batch of --batch-size, in place of picking rows from a big batch."""
FIXED = ("frozen", "classifier")
"""They pick rows by weights that are learned beforehand: no estimator."""
TRACKING = ("soba", "warm_soba", "penalty")
"""They carry the specific gradient, or what it adds up to, from step to step."""

LEAST = {
    **dict.fromkeys(
        ("steps", "seeds", "batch_size", "big_batch_size", "length", "log_every", "evaluate_rows", "steps_per_call",
         "micro_batches"), 1,
    ),
    **dict.fromkeys(
        ("seed", "trials", "trial_steps", "budget_seconds", "warmup", "schedule_steps", "finetune_steps",
         "evaluate_every", "checkpoint_every"), 0,
    ),
}  # fmt: skip
"""The smallest value of a flag."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    generic: str = "python:stdlib"
    """Generic data: files, globs or folders (comma-separated; plain text or JSON lines, gzipped or not),
    tfds:NAME[:SPLIT[:FIELD]], or python:stdlib, the source files of Python's standard library."""
    specific: str = "python:topics"
    """Specific data: a folder with train, valid and test files, or anything that --data.generic takes (then split 80/10/10
    by a hash of the text), or python:topics, Python's language reference."""
    generic_labels: Path | None = None
    """Tab-separated file whose first column names the domain of each generic document, for analysis only."""
    field: str | None = None
    """Name of the text field of JSON lines (default: text); for those of the two data sets that have fields."""
    documents: Literal["line", "file"] = "line"
    """Whether a line or a whole file of plain text is one document; for those of the two data sets that are plain text."""
    cache_dir: Path = Path("~/.cache/bilevel")
    """Where packed data is kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The main model and the weighting network."""

    size: Literal["xs", "small", "medium", "large"] = "xs"
    """Decoder: xs 2 layers/64, small 4/128 and large 12/256 (both the paper's), medium 6/256."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the main model's computation; parameters and losses stay float32."""
    remat: bool = False
    """Recompute blocks in the backward pass to save memory (on CPU only together with --model.scan-layers)."""
    scan_layers: bool = False
    """Compile one block for all layers: faster to compile when there are many."""
    weighting: Literal["conv", "ngram"] = "ngram"
    """Weighting network: convolutions over bytes, or a bag of hashed n-grams."""
    weighting_layers: int = 1
    """Layers of the convolutional weighting network (the paper: 2)."""
    weighting_width: int = 32
    """Width of the weighting network (the paper: 128)."""


@dataclass(frozen=True)
class MethodConfig:
    """How the weights are learned. What is not given here comes from the preset of the method."""

    preset: Literal["default", "paper"] = "default"
    """default: what did best on validation data at small batches; paper: the settings of the ATD paper."""
    estimator: Literal["softmax", "score"] | None = None
    """Estimator of the α-gradient. One that is not of the preset brings its own --weights.weight-learning-rate: score 1e-2,
    softmax 1e-3. score takes its rows from the filter, unless --weights.alpha-batch says otherwise."""
    alpha_batch: Literal["filtered", "uniform"] | None = None
    """Where the rows of the α-gradient come from; uniform brings the estimator softmax, which alone goes with it."""
    alpha_batch_size: int | None = None
    """Rows in the α-gradient; 0: those of the θ-update."""
    specific_batch_size: int | None = None
    """Specific rows in an α-step."""
    update_every: int | None = None
    """θ-updates for each α-update."""
    probe_every: int | None = None
    """θ-updates for each evaluation of specific rows, a multiple of --weights.update-every; 0: as often as α is updated."""
    probe_blocks: int | None = None
    """Probe the parameters of the last blocks only, this many of them (cheaper); 0: all parameters."""
    derivatives: Literal["forward", "finite"] | None = None
    """Exact forward mode, or finite differences (cheaper)."""
    normalize_alignments: bool | None = None
    """Scale the alignments of each α-step to root mean square 1."""
    weight_learning_rate: float | None = None
    """Learning rate of the weighting network (Adam)."""
    weight_warmup: int | None = None
    """θ-updates over which that rate grows from 0, while the specific gradient is still young."""
    weight_decay: float | None = None
    """Decoupled weight decay of the weighting network."""
    temperature: float | None = None
    """Temperature of the filter."""
    min_effective_fraction: float | None = None
    """Floor under the effective sample size, as a fraction of the big batch."""
    filter: Literal["gumbel_top_k", "importance", "top_k", "top_fraction", "threshold", "uniform"] | None = None
    """How rows are picked from the big batch."""
    top_fraction: float | None = None
    """Share of the big batch that the filter top_fraction draws from."""
    threshold: float | None = None
    """Logit above which the filter threshold draws; 0: what a domain classifier holds for specific rather than generic."""
    average_specific: float | None = None
    """DDS, Anograd: decay of the moving average of the specific gradient."""
    through_optimizer: bool | None = None
    """Anograd: compare the specific gradient with the optimizer's move, not with the gradient."""
    tracker: Literal["sgd", "momentum", "adam"] | None = None
    """SOBA, penalty: optimizer of v, of the reference model's offset."""
    tracker_learning_rate: float | None = None
    """SOBA, penalty: its learning rate."""
    penalty_strength: float | None = None
    """penalty: weight of the specific loss for the reference model."""
    damping: float | None = None
    """SOBA, implicit_*: λ, added to the Hessian."""
    iterations: int | None = None
    """implicit_*: Hessian products in an α-step."""
    neumann_step_size: float | None = None
    """implicit_neumann: η, below 2/(largest eigenvalue of the Hessian + λ)."""
    specific_candidates: int | None = None
    """Methods that pick rows: specific training rows in each big batch, which they may pick too; 0: none."""
    classifier_steps: int | None = None
    """classifier: updates before training begins."""
    classifier_rows: int | None = None
    """classifier: specific rows in a batch, next to as many generic ones."""
    mixing_fraction: float | None = None
    """mixing: share of specific rows in each batch, rounded to whole rows, at least one, and as many for each process. Without
    it and --trials, 1/8, 1/4, 1/2 and 3/4 are tried for a quarter of --steps each, and the best on valid is taken."""
    contrastive_start: float | None = None
    """contrastive: share of the steps that train on all generic rows, before selection."""
    contrastive_finetune_steps: int | None = None
    """contrastive: most updates on specific rows, to see what they help; the best step on valid is kept."""
    contrastive_rows: int | None = None
    """contrastive: generic rows that are scored; 0: all."""
    contrastive_fraction: float | None = None
    """contrastive: share of the scored rows that is kept."""
    contrastive_scores: Path | None = None
    """contrastive: file of scores of another run on the same generic and specific data, in place of computing them."""
    warm_start: bool | None = None
    """Begin with the weighting network of a domain classifier (see --weights.classifier-*)."""
    frozen_from: Path | None = None
    """frozen: run directory (METHOD-seedN) whose last checkpoint gives the weighting network."""


@dataclass(frozen=True)
class Config:
    """Language modelling with learned data weights.

    Trains a byte-level transformer on the generic data that a weighting network prefers, and learns that network so that
    the loss on the specific data falls. By default it compares SOBA with uniform sampling on text that ships with Python.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 5.2.
    """

    method: MethodName | None = None
    """Train one method only, instead of --compare."""
    compare: str = "uniform,soba"
    """Methods to train under the same budget, comma-separated; all: every method but frozen."""
    specific_sets: tuple[str, ...] = ()
    """Several specific data sets, each as --data.specific takes one: everything is done for each, in folders of the run
    directory that are named like their files."""
    same_seconds: bool = False
    """Train every method again, with as many steps as fit in the seconds that uniform took (or in --budget-seconds)."""
    budget_seconds: float = 0.0
    """With --same-seconds: the training seconds of each run; 0: those of uniform, on average over seeds."""
    trials: int = 0
    """Settings that are tried for each method before the comparison, the preset first, the others drawn at random; the best on
    valid is used. 0: no search."""
    trial_steps: int = 0
    """θ-updates of a trial; 0: a quarter of --steps."""
    steps: int = 3000
    """θ-updates."""
    seed: int = 0
    """First seed; decides the initial parameters, the order of the data and all random draws."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    batch_size: int = 16
    """b: rows in a θ-update."""
    big_batch_size: int = 512
    """B: rows that the weighting network scores for it."""
    length: int = 64
    """T: bytes in a row."""
    learning_rate: float = 2e-3
    """Peak learning rate of θ (Adam; warm-up, then cosine decay to 0)."""
    warmup: int = 100
    """Steps of warm-up."""
    schedule_steps: int = 0
    """Length of the learning-rate schedule, if training is to stop before its end; 0: --steps."""
    finetune_steps: int = 0
    """Longest fine-tuning on the specific data after training; the best step on valid is kept. 0: none."""
    finetune_learning_rate: float = 5e-4
    """Learning rate of fine-tuning."""
    run_dir: Path = Path("runs/language_modeling")
    """Where everything is written; the same command continues there."""
    eval_only: bool = False
    """Evaluate the checkpoints in the run directory, without training."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    evaluate_every: int = 250
    """Steps between two evaluations."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    evaluate_rows: int = 2048
    """Most rows in an evaluation while training; the final ones use all."""
    resident: Residence = "auto"
    """Keep all data on the device, and make several steps in one program call; auto: if they fit there (in an eighth of its
    memory, on CPU in 1 GiB), there is one process, and nothing needs batches that travel."""
    steps_per_call: int = 8
    """With data on the device: most steps in one call."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    micro_batches: int = 1
    """Evaluate the batch in this many equal parts, one after the other, to save memory; the update is the same to rounding."""
    shard_state: bool = False
    """Spread parameters and optimizer states over all devices, for models that do not fit on one."""
    coordinator: str | None = None
    """Multi-process run: HOST:PORT of process 0 ("auto": ask the cluster's environment). Start one process a host."""
    processes: int | None = None
    """Multi-process run: number of processes."""
    process: int | None = None
    """Multi-process run: number of this process, from 0."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: MethodConfig = field(default_factory=MethodConfig)

    @property
    def residence(self) -> Residence:
        """Where the data lie: as --resident says, but batches travel where a state is split."""
        return "never" if self.shard_state else self.resident

    def check_numbers(self) -> None:
        """Checks the flags that are numbers, and those of devices and processes, before anything is read.

        Raises:
          UserError: if one is out of range, or goes with no other.
        """
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{flag_of(name)} {getattr(self, name)} must be at least {least}.")
        for name in ("learning_rate", "finetune_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{flag_of(name)} {getattr(self, name)} must be a positive number.")
        if 0 < self.schedule_steps < self.steps:
            raise UserError(
                f"--schedule-steps {self.schedule_steps} ends the learning rate before --steps {self.steps}: give at least as "
                "many, or 0."
            )
        for name, other in (("budget_seconds", "same_seconds"), ("trial_steps", "trials")):
            if getattr(self, name) and not getattr(self, other):
                raise UserError(
                    f"{flag_of(name)} {getattr(self, name)} counts only with {flag_of(other)}: add it, or leave {flag_of(name)} "
                    "away."
                )
        alone = next((name for name in ("processes", "process") if getattr(self, name) is not None), None)
        if alone is not None and self.coordinator is None:
            raise UserError(f"{flag_of(alone)} needs --coordinator HOST:PORT, the address of process 0, or auto.")
        if self.coordinator not in (None, "auto") and None in (self.processes, self.process):
            raise UserError(f"--coordinator {self.coordinator} needs --processes and --process (from 0) too.")
        if self.resident == "always" and (self.shard_state or self.coordinator):
            other = "--shard-state" if self.shard_state else "--coordinator"
            raise UserError(
                f"--resident always keeps everything on each device of one process: leave it or {other} away."
            )
        for name in ("weighting_layers", "weighting_width"):
            if getattr(self.model, name) < 1:
                raise UserError(f"{flag_of(f'model.{name}')} {getattr(self.model, name)} must be at least 1.")

    def methods(self) -> list[str]:
        """The methods to train.

        Raises:
          UserError: if one is unknown.
        """
        return chosen_methods(self.method, self.compare, METHODS, ALL)


NOT_PROPORTIONAL = ("top_k", "top_fraction", "threshold", "uniform")
"""Filters that the estimator "score" does not go with."""


def settings_of(config: Config, method: str) -> dict[str, Any]:
    """The preset of a method, with what the user gave in its place; what the preset adds to save time gives way to it.

    An estimator that is not the preset's brings its own weight rate, to the methods that use one.
    """
    given = {k: v for k, v in dataclasses.asdict(config.weights).items() if v is not None and k != "preset"}
    settings = PRESETS[config.weights.preset][method] | given
    settings = {name: value for name, value in settings.items() if _concerns(name, method)}
    remembers = method in TRACKING or settings["average_specific"] > 0
    _reconcile(settings, given, method)
    if method not in (*PLAIN, *FIXED) and settings["estimator"] != PRESETS[config.weights.preset][method]["estimator"]:
        settings["weight_learning_rate"] = given.get("weight_learning_rate", RATES[settings["estimator"]])
    if "probe_every" not in given and ("update_every" in given or not remembers):
        settings["probe_every"] = 0
    if "probe_blocks" not in given and config.model.scan_layers:
        settings["probe_blocks"] = 0  # the blocks' parameters are stacked, and cannot be chosen apart
    settings["specific_batch_size"] = settings["specific_batch_size"] or config.batch_size
    settings["alpha_batch_size"] = settings["alpha_batch_size"] or None
    return settings


def _reconcile(settings: dict[str, Any], given: dict[str, Any], method: str) -> None:
    """Leaves aside what a method has no use for, and fits what was not given to what was: one set of flags serves all methods."""
    if "probe_every" in given and "update_every" not in given:  # α is updated on every step that is probed
        settings["update_every"] = math.gcd(settings["update_every"], given["probe_every"])
    if "estimator" not in given and given.get("filter") in NOT_PROPORTIONAL:
        settings["estimator"] = "softmax"
    if method in DENSE:  # they have no α-batch apart, and weigh rows by their weights
        settings |= {"alpha_batch": "filtered", "alpha_batch_size": 0, "estimator": "softmax"}
    if method == "learning_to_reweight":  # which forgets its weights after each step
        settings |= {"update_every": 1, "probe_every": 0}
    if method in (*PLAIN, *FIXED):  # they learn no weights
        if settings["estimator"] == "score":
            settings["alpha_batch"] = "filtered"
    elif "estimator" not in given and settings["alpha_batch"] != "filtered":
        settings["estimator"] = "softmax"
    elif settings["estimator"] == "score" and "alpha_batch" not in given:
        settings["alpha_batch"] = "filtered"


_FOR_ONE = {"mixing_": "mixing", "contrastive_": "contrastive", "neumann_": "implicit_neumann", "penalty_": "penalty"}


def _concerns(name: str, method: str) -> bool:
    """Whether a method has this setting: those of one method alone are no settings of the others."""
    return next((owner == method for prefix, owner in _FOR_ONE.items() if name.startswith(prefix)), True)
