"""The flags of the image-classification experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from experiments.cli import Residence, chosen_methods
from experiments.image_classification.sampler_config import SamplerConfig

MethodName: TypeAlias = Literal[
    "uniform", "dds", "retrained_dds", "anograd", "spcl", "learning_to_reweight", "mentornet", "rho_loss", "train_loss",
    "gradient_norm", "gradient_norm_is", "irreducible_loss", "svp", "rl_sampler", "replayed",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(MethodName)
LEARNED = ("dds", "retrained_dds", "anograd")
"""They learn a scorer."""
DENSE = (*LEARNED, "spcl", "learning_to_reweight", "mentornet")
"""They weigh all rows of a batch of --batch-size, in place of picking rows from a big batch."""
TABLED = ("rho_loss", "irreducible_loss")
"""They need the irreducible losses of the training rows."""
SCORING = ("rho_loss", "train_loss", "gradient_norm", "gradient_norm_is")
"""They score rows by what a model says about them: the target, or --weights.scorer-network."""
SELECTING = (*SCORING, "irreducible_loss")
"""They pick --batch-size rows of --big-batch-size on every step."""
SAMPLED = ("rl_sampler", "replayed")
"""Their sampler picks rows by their numbers, before anything is loaded."""

NEWER: dict[str, Any] = {"nesterov": True, "milestones": (), "decay": 0.1}
NEWER_DATA: dict[str, Any] = {"padding_mode": "zero"}
NEWER_WEIGHTS: dict[str, Any] = {"estimator": "softmax"}
"""Flags that came later, with what was done before them: see `without_newer`."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and what is made wrong with the training set."""

    source: str = "sklearn:digits"
    """sklearn:digits (1,797 images that come with scikit-learn), tfds:NAME, a .npz file, a prefix of .npz files, a folder of
    images train/CLASS/*.png, or rows of features: sklearn:breast_cancer, a .npz, .csv or .parquet file; see
    bilevel.data.open_labelled."""
    label: str | None = None
    """Files: name of the column, or the array, of the labels; none given: label, labels, y or target. Archives with x_train and
    folders of images take none."""
    standardize: bool = True
    """Features: to mean 0 and variance 1 over the training set, each. Images always are, by channel."""
    dev: float = 0.1
    """Rows of the dev set, or, if below 1, their share of the source's training part (of its validation part, if it has one).
    Weights are learned from it, and choices made by it."""
    holdout: float = 0.2
    """Likewise, of the held-out set that irreducible losses are learned from; 0: none (see --weights.no-holdout)."""
    test: float = 0.2
    """Likewise, of the test set, for a source that has none of its own. It is only reported."""
    limit: int | None = None
    """Use only the first rows of the source's training part, this many (DDS: 4000 of CIFAR-10)."""
    split: Literal["random", "last"] = "random"
    """Which rows are dev, held out and test: drawn, or the last ones in stored order (as DDS and RLSampler do)."""
    seed: int = 0
    """Of that draw, of the noise, and of the irreducible-loss model: they are the same for all seeds of a comparison."""
    noise: str = "uniform"
    """Wrong labels in the training set: none, uniform (any other class of the training set), pair (the next one), confused (of
    the four classes that a trained model confuses most, the class it takes them for), or FILE.npz:NAME, an array of labels in the
    order of the source's training part (such as worse_label of CIFAR-10N)."""
    noise_fraction: float | None = None
    """Share of labels that are replaced (default: 0.4; 0.5 of the labels of the classes concerned, with confused)."""
    noisy_holdout: bool = False
    """Make labels of the held-out set wrong in the same manner."""
    relevant: Literal["all", "half"] = "all"
    """half: only half of the classes count; dev, held-out and test hold no others (RHO-LOSS, section 5.2)."""
    imbalance: float = 1.0
    """How many times more rows of the first class than of the last are kept for training; 1: all rows."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Augment training images: cut at a random place after padding; also mirrored."""
    padding: int = 4
    """Pixels of padding for it."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """What the padding holds: the mean colour, or the image reflected at its outermost pixels."""
    size: int | None = None
    """Resize decoded images to this height and width."""
    cache_dir: Path = Path("~/.cache/bilevel")
    """Where decoded images are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The classifier."""

    network: str = "mlp"
    """mlp, mlp-small, cnn, cnn-small, resnet18, resnet20, resnet50, vgg16, vgg16-plain (without BatchNorm), or
    wrnDEPTH-WIDTH such as wrn28-2."""
    width: int = 256
    """Units of each of the three hidden layers of mlp; mlp-small has an eighth of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and losses stay float32."""


@dataclass(frozen=True)
class MethodConfig(SamplerConfig):
    """Settings of single methods."""

    derivatives: Literal["forward", "finite"] = "finite"
    """DDS, Anograd: exact rewards by forward mode, or equation 7 (finite differences, cheaper)."""
    reward: Literal["dot", "cosine"] = "dot"
    """DDS: dot product of each row's gradient with that of the dev batch after the update (algorithm 1), or their cosine (a
    backward pass a row)."""
    estimator: Literal["softmax", "uniform"] = "softmax"
    """DDS, Anograd: the gradient of the weighted mean reward (equation 13), or that of algorithm 1, line 9, in which all rows
    count the same."""
    scorer_labels: bool = True
    """DDS, Anograd: the scorer sees the label: it has an output for each class, of which that of the label counts. Without, it
    sees the image alone, as in the paper."""
    scorer_learning_rate: float = 3e-4
    """DDS, Anograd: learning rate of the scorer (Adam)."""
    scorer_bound: float = 4.0
    """DDS, Anograd: scores are squashed into ± this bound, s ↦ bound · tanh(s / bound), so that rows of which the scorer is sure
    weigh the same; 0: no bound, as in the paper."""
    average_specific: float = 0.9
    """DDS, Anograd: decay of the moving average of the dev gradient; 0: none, as in the paper."""
    normalize_alignments: bool = True
    """DDS, Anograd: scale the rewards of each step to root mean square 1."""
    min_effective_fraction: float = 0.0
    """DDS, Anograd: floor under the effective sample size of the weights, as a share of the batch; 0: none, as in the paper."""
    update_every: int = 1
    """DDS, Anograd: θ-updates for each update of the scorer."""
    dev_batch_size: int = 0
    """DDS, Anograd, learning_to_reweight, mentornet: dev rows in a step; 0: --batch-size."""
    pace_start: float = 2.0
    """spcl: λ at the start, as a multiple of the loss of guessing, log(classes)."""
    pace_end: float = 3.0
    """spcl: λ at the end, likewise."""
    burn_in: float = 0.05
    """mentornet: share of the steps in the beginning in which all rows count the same."""
    mentor_learning_rate: float = 1e-2
    """mentornet: learning rate of the mentor (Adam)."""
    statistics: Literal["batch", "running"] = "batch"
    """Online selection: what BatchNorm normalises the scored rows by."""
    scorer_network: str | None = None
    """Online selection: network of a small proxy that scores the rows in place of the target, and is trained along with it on
    the rows picked; none given: the target scores."""
    scoring_dtype: Literal["float32", "bfloat16"] | None = None
    """Online selection: type of the scoring forward pass; none given: that of the model."""
    il_network: str | None = None
    """Irreducible losses: network of the model trained on the held-out set; none given: that of the target (with a small
    scorer too: on MNIST it served better than one of the scorer's size)."""
    il_steps: int = 1000
    """Irreducible losses, svp: steps of training; the parameters with the lowest dev loss are kept."""
    no_holdout: bool = False
    """Irreducible losses without a held-out set: each half of the training set is scored by a model trained on the other. Give
    --data.holdout 0 with it, or the held-out rows are used for nothing."""
    table: Path | None = None
    """Irreducible losses from this file of another run on the same data (RUN_DIR/irreducible/table.safetensors)."""
    svp_network: str | None = None
    """svp: network of the proxy; none given: that of the target."""
    svp_fraction: float = 0.5
    """svp: share of the training rows that is kept, those of the highest entropy."""


@dataclass(frozen=True)
class Config:
    """Image classification with learned data weights and online batch selection.

    Trains a classifier on data with known faults, by methods that choose what to train on, and compares their accuracy on the
    test set, the steps they need, and what they choose. By default: handwritten digits, 40 % of the training labels wrong.

    References: Wang et al., "Optimizing Data Usage via Differentiable Rewards" (DDS), algorithm 1, section 4 and appendix A.4;
    Mindermann et al., "Prioritized training on points that are learnable, worth learning, and not yet learnt" (RHO-LOSS);
    "Adaptive Dataset Sampling by Deep Policy Gradient" (RLSampler), sections 5 and 6.
    """

    method: MethodName | None = None
    """Train one method only, instead of --compare."""
    compare: str = "uniform,dds,rho_loss"
    """Methods to train under the same budget of steps, comma-separated; all: every method (replayed only if
    --weights.sequence-from is given)."""
    steps: int = 1000
    """θ-updates."""
    seed: int = 0
    """First seed; decides the initial parameters, the order of the data and all random draws."""
    seeds: int = 1
    """Number of seeds: seed, seed + 1, …"""
    batch_size: int = 32
    """n_b: rows in a θ-update."""
    big_batch_size: int = 320
    """n_B: rows that online selection picks them from."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Of θ."""
    learning_rate: float = 1e-3
    """Peak learning rate of θ."""
    momentum: float = 0.9
    """sgd: its momentum."""
    nesterov: bool = True
    """sgd: Nesterov momentum."""
    weight_decay: float = 0.01
    """Decoupled (adamw), or added to the gradient (sgd); adam has none."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate after warm-up: constant, cosine decay to 0 (DDS), or multiplied by --decay at each of --milestones."""
    milestones: tuple[int, ...] = ()
    """With --schedule step: θ-updates, counted from the first, after which the learning rate changes."""
    decay: float = 0.1
    """With --schedule step: factor of each change."""
    warmup: int = 0
    """Steps of warm-up."""
    average: float = 0.0
    """Evaluate a moving average of the parameters and BatchNorm statistics with this decay (DDS: 0.999); 0: the last ones."""
    targets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    """Test accuracies; reported are the steps and epochs until each is reached."""
    run_dir: Path = Path("runs/image_classification")
    """Where everything is written; the same command continues there."""
    eval_only: bool = False
    """Evaluate the checkpoints in the run directory, without training."""
    log_every: int = 25
    """Steps between two rows of metrics."""
    evaluate_every: int = 25
    """Steps between two evaluations."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    evaluate_rows: int = 0
    """Most rows of each set in an evaluation while training; 0: all. The final ones use all."""
    resident: Residence = "auto"
    """Keep all data on the device, and make several steps in one program call; auto: if they fit there (in an eighth of its
    memory, on CPU in 1 GiB). rl_sampler and replayed always do."""
    steps_per_call: int = 25
    """With data on the device: most steps in one call."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    micro_batches: int = 1
    """Evaluate (and score) batches in this many equal parts, one after the other, to save memory."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: MethodConfig = field(default_factory=MethodConfig)

    def methods(self) -> list[str]:
        """The methods to train.

        Raises:
          UserError: if one is unknown.
        """
        everything = [name for name in METHODS if name != "replayed" or self.weights.sequence_from]
        return chosen_methods(self.method, self.compare, METHODS, everything)
