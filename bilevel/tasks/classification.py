"""Classification of images, or of rows of features, with faults in the data (DDS, section 4; RHO-LOSS; RLSampler)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from bilevel.data import ArrayDataset, LabelledData, channel_statistics, digest, open_labelled
from bilevel.data.labelled import corruption as faults
from bilevel.data.labelled.mosaic import mosaic
from bilevel.data.labelled.noise import label_noise
from bilevel.devices import sharding
from bilevel.nn.augment import preparation, standardization
from bilevel.nn.class_weighting import class_weighting
from bilevel.nn.classification import Prepare, classification_loss, init_variables
from bilevel.nn.head import with_head
from bilevel.nn.networks import last_blocks, network_of
from bilevel.offline.confusion import confused_classes
from bilevel.selection.scorers import bounded
from bilevel.selection.scoring import scoring_loss
from bilevel.study import Evaluate, Known, Measure, Model, ModelOptions, Picture, Splits, Text, Weighting
from bilevel.study.config import Study
from bilevel.study.fitting import fit_of
from bilevel.study.task import mean_evaluator
from bilevel.training.fit import best_of
from bilevel.training.optimizers import OptimizerConfig
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.settings import Amount, Count, Portion, Some, free, plain
from bilevel.types import LossFn, UserError

_CONFUSED = 4


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, and what is made wrong with the training set."""

    source: str = "sklearn:digits"
    """sklearn:digits (1,797 images that come with scikit-learn), tfds:NAME, a .npz file, a prefix of .npz files, a folder of
    images train/CLASS/*.png, or rows of features: sklearn:breast_cancer, a .npz, .csv or .parquet file."""
    label: str | None = None
    """Files: name of the column, or the array, of the labels; none given: label, labels, y or target."""
    standardize: bool = True
    """Features: to mean 0 and variance 1 over the training set, each. Images always are, by channel."""
    specific_rows: Some = 0.1
    """Rows of the specific set, or, if below 1, their share of the source's training part (of its validation part, if it has
    one). Weights are learned from it, and choices made on it."""
    held_out: Amount = 0.2
    """Likewise, of the held-out set that irreducible losses are learned from; 0: none."""
    test: Some = 0.2
    """Likewise, of the test set, for a source that has none of its own. It is only reported."""
    limit: Count | None = None
    """Use only the first rows of the source's training part, this many (DDS: 4000 of CIFAR-10)."""
    split: Literal["random", "last"] = "random"
    """Which rows are specific, held out and test: drawn, or the last ones in stored order (as DDS and RLSampler do)."""
    seed: NonNegativeInt = 0
    """Of that draw and of the noise: they are the same for all seeds of a comparison."""
    noise: str = "uniform"
    """Wrong labels in the training set: none, uniform (any other class of the training set), pair (the next one), confused (of
    the four classes that a trained model confuses most, the class it takes them for), or FILE.npz:NAME, an array of labels in the
    order of the source's training part (such as worse_label of CIFAR-10N)."""
    noise_fraction: Portion | None = None
    """Share of labels that are replaced (default: 0.4; 0.5 of the labels of the classes concerned, with confused)."""
    noisy_held_out: bool = False
    """Make labels of the held-out set wrong in the same manner."""
    confusion_steps: Count = 10_000
    """confused: most training steps of that model, which ends when valid has not improved for 500."""
    relevant: Literal["all", "half"] = "all"
    """half: only half of the classes count; specific, held-out and test hold no others (RHO-LOSS, section 5.2)."""
    imbalance: Annotated[float, Field(ge=1)] = 1.0
    """How many times more rows of the first class than of the last are kept for training; 1: all rows."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Augment training images: cut at a random place after padding; also mirrored."""
    padding: int = 4
    """Pixels of padding for it."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """What the padding holds: the mean colour, or the image reflected at its outermost pixels."""
    size: Count | None = None
    """Resize decoded images to this height and width."""
    cache_dir: Path = free(Path("~/.cache/bilevel"))
    """Where decoded images are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The classifier, and the weighting network, which has its architecture and weights of its own."""

    network: str = "mlp"
    """mlp, mlp-small, cnn, cnn-small, resnet8, resnet18, resnet20, resnet50, vgg16, vgg16-plain (without BatchNorm), or
    wrnDEPTH-WIDTH such as wrn28-2."""
    width: Count = 256
    """Units of each of the three hidden layers of mlp; mlp-small has an eighth of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and losses stay float32."""
    weighting_labels: bool = True
    """The weighting network sees the label: it has an output for each class, of which that of the label counts. Without, it
    sees the image alone, as in the paper."""
    weighting_bound: NonNegativeFloat = 4.0
    """Logits are squashed into ± this bound, s ↦ bound · tanh(s / bound), so that rows of which the network is sure weigh
    alike; 0: no bound, as in the paper."""


@dataclass(frozen=True)
class ClassificationConfig:
    """The settings of the task."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Rows(Splits):
    """The splits of a classification task, with what its networks need."""

    sets: LabelledData | None = None
    inputs: str = "image"
    plain: Prepare = lambda x, rng: x
    augmented: Prepare = lambda x, rng: x

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        assert isinstance(self.train, ArrayDataset)
        return self.train.arrays[self.inputs].shape[1:]


_LEARNED: dict[str, Any] = {
    "mode": "dense", "weight_learning_rate": 3e-4, "entropy_bonus": 0.03, "shift_pull": 0.0, "probe_every": 0,
    "probe_blocks": 0, "average_specific": 0.9,
}  # fmt: skip
_TRACKED = {name: value for name, value in _LEARNED.items() if name != "average_specific"}
_PAPER: dict[str, Any] = {"alpha_batch": "filtered", "estimator": "uniform", "weight_learning_rate": 3e-4}
_DDS_CIFAR10: dict[str, Any] = {
    "extends": "paper",
    "study": {
        "compare": "uniform,spcl,learning_to_reweight,mentornet,dds,retrained_dds", "steps": 200_000, "batch_size": 128,
        "log_every": 100, "evaluate_every": 1000, "checkpoint_every": 2000, "run_dir": Path("runs/dds_cifar10"),
        "optimizer": {
            "name": "sgd", "learning_rate": 0.1, "schedule": "cosine", "warmup": 2000, "average": 0.999, "weight_decay": 5e-4,
        },
    },
    "task": {
        "data": {
            "source": "tfds:cifar10", "noise": "none", "limit": 4000, "split": "last", "specific_rows": 400, "held_out": 0,
            "augment": "crop_flip", "padding_mode": "reflect",
        },
        "model": {"network": "wrn28-2"},
    },
}  # fmt: skip
"""Wang et al., table 1 left, section 4.1 and appendix A.4. The paper is silent on momentum, weight decay and augmentation: they
are those of Zagoruyko and Komodakis, section 3, whose results it says that its networks reproduce."""
_PRESETS: dict[str, Any] = {
    "default": {
        "study": {
            "compare": "uniform,dds,rho_loss", "steps": 1000, "batch_size": 32, "big_batch_size": 320, "log_every": 25,
            "evaluate_every": 25, "checkpoint_every": 500, "evaluate_rows": 0, "steps_per_call": 25,
            "targets": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95), "run_dir": Path("runs/image_classification"),
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01},
        },
        **dict.fromkeys(("dds", "retrained_dds", "anograd", "implicit_cg", "implicit_neumann"), _LEARNED),
        **dict.fromkeys(("soba", "penalty", "warm_soba"), _TRACKED),
        "anograd": _LEARNED | {"through_optimizer": False},
        "meta_weight_net": {"average_specific": 0.9, "shift_pull": 0.0},
        "contrastive": {"fraction": 0.5},
    },
    "paper": {
        "task": {"model": {"weighting_labels": False, "weighting_bound": 0.0}},
        **dict.fromkeys(("dds", "retrained_dds", "anograd"), _PAPER),
    },
}  # fmt: skip
TABULAR_STUDY: dict[str, Any] = {"steps": 500, "batch_size": 16, "big_batch_size": 160, "run_dir": Path("runs/tabular")}


class Classification:
    """Classification with learned data weights and online batch selection.

    Trains a classifier on data with known faults, by methods that choose what to train on, and compares their accuracy on the
    test set, the steps they need, and what they choose. By default: handwritten digits, 40 % of the training labels wrong.
    """

    title = "Classification with learned data weights"
    config = ClassificationConfig
    measures: Sequence[Measure] = (
        Measure("accuracy", "accuracy", lower_is_better=False), Measure("loss", "loss", 3, "nats"),
    )  # fmt: skip

    def __init__(self, name: str, presets: Mapping[str, Mapping[str, Any]]):
        self.name, self.presets = name, presets

    def open(self, config: ClassificationConfig, folder: Path) -> Rows:
        """Open the data and make wrong, irrelevant or rare what the flags say.

        Rare classes are those of the true labels; then labels are made wrong; last, classes are marked.
        """
        d = config.data
        sets = open_labelled(
            d.source, specific=d.specific_rows, held_out=d.held_out, test=d.test, limit=d.limit,
            split=d.split, seed=d.seed, size=d.size, label=d.label, cache_dir=d.cache_dir,
        )  # fmt: skip
        if d.imbalance != 1.0:
            rare = partial(faults.long_tail, factor=d.imbalance, num_classes=sets.num_classes, seed=d.seed)
            sets = sets.transform(rare, "train")
        noisy = label_noise(
            d.noise, d.noise_fraction, sets, seed=d.seed, also_held_out=d.noisy_held_out,
            confused=lambda: self._confused(config, sets, folder),
        )  # fmt: skip
        if noisy is not None:
            sets = sets.transform(noisy, "train")
            sets = sets.transform(noisy, "held_out") if d.noisy_held_out else sets
        if d.relevant == "half":
            counted = faults.half_of_classes(sets.num_classes, seed=d.seed)
            sets = sets.transform(lambda arrays: faults.mark_relevant(arrays, counted), "train")
            sets = sets.transform(lambda arrays: faults.only_classes(arrays, counted), "specific", "held_out", "test")
        return prepared(d, sets)

    def model(self, config: ClassificationConfig, splits: Rows, options: ModelOptions) -> Model:
        """Build the classifier."""
        m, name = config.model, options.network or config.model.network
        network = network_of(name, splits.classes, splits.shape, width=m.width, dtype=options.dtype or m.dtype)
        init = partial(init_variables, network, shape=splits.shape)
        shapes, _ = jax.eval_shape(init, jax.random.key(0))  # refuses inputs that are too small

        def loss(train: bool, prepare: Prepare = splits.plain) -> LossFn:
            return classification_loss(network, train=train, prepare=prepare, inputs=splits.inputs)

        return Model(
            init,
            loss(True, splits.augmented),
            loss(True),
            loss(False),
            scoring=lambda statistics: scoring_loss(lambda train: with_head(loss(train)), statistics=statistics),  # pyright: ignore[reportArgumentType]
            part=partial(last_blocks, params=shapes),
            describe=name,
        )

    def weighting(self, config: ClassificationConfig, splits: Rows) -> Weighting:
        """Build the weighting network: the classifier's architecture with weights of its own."""
        m = config.model
        outputs = splits.classes if m.weighting_labels else 1
        network = network_of(m.network, outputs, splits.shape, width=m.width, dtype=m.dtype, dropout=False)
        seen = {"inputs": splits.inputs, "labels": m.weighting_labels}
        init, logits = class_weighting(network, splits.shape, splits.plain, **seen)
        return Weighting(init, bounded(logits, m.weighting_bound))

    def evaluate(self, config: ClassificationConfig, splits: Rows, model: Model) -> Evaluate:
        """Return accuracy and loss, means over rows."""
        return mean_evaluator(model.evaluation, model.at_once, accuracy="correct")

    def show(
        self, config: ClassificationConfig, splits: Rows, ids: NDArray[np.integer[Any]]
    ) -> Sequence[Text | Picture]:
        """Return the images, each below its label, as one picture, wrong labels in red; rows of features as text."""
        assert isinstance(splits.train, ArrayDataset)
        labels, names = splits.train.arrays["label"], splits.known["class"].names
        if splits.inputs != "image":
            rows = splits.train.arrays[splits.inputs]
            return [Text(0.0, names[labels[i]], " ".join(f"{x:.4g}" for x in rows[i])) for i in ids]
        fault = splits.known.get("wrong_label")
        wrong = np.zeros(len(ids), bool) if fault is None else fault.values[ids] == 1
        return [Picture("", mosaic(splits.train.arrays["image"][ids], [names[labels[i]] for i in ids], wrong))]

    def _confused(self, config: ClassificationConfig, sets: LabelledData, folder: Path) -> dict[int, int]:
        """The four classes that a model, trained on right labels, takes most often for another one, and that one.

        It is asked about the specific and held-out rows; its answer is kept, in a folder named after its settings.
        """
        rows = prepared(config.data, sets)
        study = Study(batch_size=32, optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.01))
        model, d = self.model(config, rows, ModelOptions()), config.data
        mesh = sharding.make_mesh(jax.local_devices()[:1])
        fit = fit_of(
            study, mesh, model, self.evaluate(config, rows, model), rows.train, rows.specific, config.model,
            steps=d.confusion_steps, seed=d.seed,
        )  # fmt: skip
        asked = [part for part in (rows.specific, rows.held_out) if isinstance(part, ArrayDataset)]
        settings = {**fit.settings, "data": plain(d), "asked": [part.content_hash for part in asked]}
        file = folder / "confusion" / digest([json.dumps(settings, sort_keys=True)])[:12] / "pairs.json"
        if not file.exists():
            found = best_of(fit, file.parent / "model")
            assert model.scoring is not None
            pairs = confused_classes(
                model.scoring("running"), found.params, found.model_state, asked, rows.classes, _CONFUSED
            )
            write_json(file, {str(source): int(target) for source, target in pairs.items()})
        return {int(source): target for source, target in read_json(file).items()}


def prepared(d: DataConfig, sets: LabelledData) -> Rows:
    """Return the sets as learners read them, and what is known about the training rows."""
    inputs, arrays = ("image" if "image" in sets.train.arrays else "features"), sets.train.arrays

    def bare(part: ArrayDataset) -> ArrayDataset:
        return ArrayDataset({name: part.arrays[name] for name in (inputs, "label")}, name=part.name)

    names = tuple(sets.class_names) or tuple(str(c) for c in range(sets.num_classes))
    known = {"class": Known(np.asarray(arrays.get("clean_label", arrays["label"]), np.int32), names)}
    for name, of, values in (
        ("wrong_label", "corrupted", ("right", "wrong")),
        ("irrelevant", "relevant", ("yes", "no")),
    ):
        if of in arrays:
            marks = np.asarray(arrays[of] if of == "corrupted" else ~arrays[of], np.int32)
            known |= {name: Known(marks, values, fault=True)} if marks.any() else {}
    train, specific, test = bare(sets.train), bare(sets.specific), bare(sets.test)
    usual, augmented = _preparations(d, inputs, sets)
    noise = "" if d.noise == "none" else f" Noise: {d.noise}."
    return Rows(
        train=train, specific=specific, valid={"specific": specific}, test={"test": test},
        held_out=None if sets.held_out is None else bare(sets.held_out), known=known, classes=sets.num_classes,
        about=f"Data: {d.source}; {sets.rule}.{noise}", sets=sets, inputs=inputs, plain=usual, augmented=augmented,
    )  # fmt: skip


def _preparations(d: DataConfig, inputs: str, sets: LabelledData) -> tuple[Prepare, Prepare]:
    """Inputs as networks take them, and the same augmented as the flags say."""
    if inputs == "image":
        height, width = sets.train.arrays["image"].shape[1:3]
        if d.augment != "none" and (d.padding < 0 or (d.padding_mode == "reflect" and d.padding >= min(height, width))):
            raise UserError(
                f"--data.padding {d.padding} with --data.padding-mode {d.padding_mode} must be at least 0, and with reflect "
                f"smaller than the images, which have {height} × {width} pixels."
            )
        mean, std = channel_statistics(sets.train)
        more = {"padding": d.padding, "mode": d.padding_mode, "flip": d.augment == "crop_flip"}
        return preparation(mean, std, augment=False), preparation(mean, std, augment=d.augment != "none", **more)
    features = sets.train.arrays["features"]
    if d.augment != "none":
        raise UserError(
            f"--data.augment {d.augment} needs images, but {d.source} holds rows of {features.shape[1]} features: omit it."
        )
    prepare = standardization(features) if d.standardize else lambda rows, rng: rows
    return prepare, prepare


TASK = Classification("image_classification", {**_PRESETS, "dds_cifar10": _DDS_CIFAR10})
_TABLES = {
    "study": _PRESETS["default"]["study"] | TABULAR_STUDY,
    "task": {
        "data": {"source": "sklearn:breast_cancer", "noise_fraction": 0.2}, "model": {"network": "mlp", "width": 64},
    },
}  # fmt: skip
TABULAR = Classification("tabular", {**_PRESETS, "default": _PRESETS["default"] | _TABLES})
