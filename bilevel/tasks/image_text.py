"""Images and captions: generic pairs, and a small specific set of classes (Grangier et al., ATD, section 5.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from bilevel.data import (
    CaptionColumns,
    CaptionParts,
    CaptionRows,
    CaptionSource,
    TextEmbedding,
    embed_captions,
    given_by,
    hold_out_captions,
    image_statistics,
    labelled_captions,
    note_close_captions,
    open_captions,
    open_embedding,
    open_specific_captions,
    pack_captions,
    warn_of_shared_images,
)
from bilevel.data.captions.caption_rows import TextType
from bilevel.data.captions.caption_writer import Decode
from bilevel.data.labelled.mosaic import captioned
from bilevel.data.streams import NO_FAULT
from bilevel.nn.augment import preparation
from bilevel.nn.classification import Prepare
from bilevel.nn.image_text.losses import class_caption_loss, image_text_loss, with_past
from bilevel.nn.image_text.towers import ImageText, image_text, init_image_text, last_image_blocks
from bilevel.nn.image_text.weighting import image_weighting
from bilevel.selection.known import known_labels
from bilevel.selection.scorers import bounded
from bilevel.selection.scoring import scoring_loss
from bilevel.study import Evaluate, Measure, Model, ModelOptions, Picture, Splits, Text, Weighting, evaluator
from bilevel.study.methods.learning import LEARNING
from bilevel.study.task import Past
from bilevel.training.settings import Count, free
from bilevel.types import Array, Batch, LossFn, ModelState, Params

_PAST = "past"


@dataclass(frozen=True)
class DataConfig:
    """Where the captioned images come from; docs/captions.md lists what is read."""

    generic: str = "matplotlib:glyphs"
    """Captioned images: a table of paths and captions, a folder of images with caption files, .tar shards, .npz archives
    (comma-separated), tfds:NAME[:SPLIT], or matplotlib:glyphs, the glyphs of matplotlib's fonts with their Unicode names."""
    specific: str = "sklearn:digits"
    """Specific images with classes: a folder with train, valid and test, NAME of files NAME_train.npz and so on, anything that
    --data.generic takes (then split 80/10/10 by a hash of the image), or sklearn:digits, handwritten digits."""
    image_column: str | None = None
    """Name of the column, field or array of the images, where it is not a usual one."""
    caption_column: str | None = None
    """Likewise, of the captions."""
    class_column: str | None = None
    """Likewise, of the classes of specific images."""
    template: str | None = None
    """Caption of a class, with {} for its name; none given: "a photo of a {}"."""
    class_captions: Path | None = None
    """File with the captions of the classes instead: lines CLASS<TAB>CAPTION, or NUMBER<TAB>NAME<TAB>CAPTION."""
    specific_per_class: tuple[Count, Count] | None = None
    """Specific images of each class in train and in valid, where they come in one piece; all others are test."""
    generic_labels: str | None = None
    """Tab-separated file with the domain of each generic image, and perhaps its fault (none, wrong caption, …) in a second
    column, for analysis only."""
    known_faults: bool = False
    """Let methods learn from the faults of generic images (mentornet does)."""
    size: Count = 16
    """Height and width of the images that the model sees: the shorter side is scaled to it, and the longer one cut."""
    small_size: Count = 16
    """Likewise, of those that the weighting network sees."""
    decode: Decode = "once"
    """Keep the pixels of all images (once), or their files, decoding the rows of a batch (each_time): for large images."""
    embedding: str = "lsa"
    """Vectors of captions: lsa, latent semantic analysis of the generic captions, or a .npz file with captions and embeddings."""
    text_dimensions: Count = 256
    """lsa: their dimensions."""
    text_type: TextType = "float32"
    """Type in which they are kept."""
    past: Count = 512
    """K: captions before a (big) batch that each of its rows is compared with."""
    augment: Literal["none", "crop", "crop_flip"] = "crop"
    """Augment generic images in training: cut at a random place after padding; also mirrored."""
    padding: NonNegativeInt = 2
    """Pixels of padding for it."""
    cache_dir: Path = free(Path("~/.cache/bilevel"))
    """Where decoded images and vectors are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The two towers and the weighting network."""

    network: str = "resnet8"
    """Image tower: resnet8, resnet20, resnet18 or resnet50."""
    width: Count = 128
    """Of the space of images and captions."""
    text_hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (128, 128)
    """Units of each hidden layer of the text tower."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation in the image tower; parameters and losses stay float32."""
    weighting_features: Annotated[tuple[Count, ...], Field(min_length=1)] = (8, 8, 8, 16)
    """Channels of each convolution of the weighting network."""
    weighting_bound: NonNegativeFloat = 0.0
    """Logits are squashed into ± this bound; 0: no bound."""


@dataclass(frozen=True)
class ImageTextConfig:
    """The settings of the task."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class CaptionSplits(Splits):
    """The captioned images, and what the losses need."""

    rows: CaptionRows
    """The rows of `train`."""
    class_texts: NDArray[np.floating[Any]] | None
    """Vectors of the captions of classes, `[C, d]`; None: specific images have captions of their own."""
    compared: Mapping[str, NDArray[Any]]
    """A past that stays the same, for losses that are compared with each other, and for batches that bring none along."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of each channel."""


_ATD: dict[str, Any] = {
    "extends": "paper",
    "study": {
        "compare": "uniform,mixing,contrastive,classifier,meta_weight_net,learning_to_reweight,dds,anograd,soba",
        "steps": 500_000, "batch_size": 256, "big_batch_size": 2048, "run_dir": Path("runs/atd_image_text"), "two_stage": True,
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "schedule": "cosine", "warmup": 2000},
        "log_every": 100, "evaluate_every": 2500, "checkpoint_every": 5000,
    },
    "task": {
        "data": {
            "size": 224, "small_size": 32, "decode": "each_time", "past": 8192, "augment": "crop_flip", "padding": 16,
            "specific_per_class": (30, 50),
        },
        "model": {
            "network": "resnet50", "width": 1024, "text_hidden": (768, 768), "weighting_features": (32, 32, 32, 64),
        },
    },
    **{name: {"weight_learning_rate": 1e-4} for name in ("classifier", "meta_weight_net", "dds", "anograd", "soba")},
}  # fmt: skip
"""Grangier et al., section 5.4, tables 1 and 15. Ours, where the paper is silent: the schedule, the past, the joint width, the
augmentation, and the resolution of 224."""


class ImageTextTask:
    """Contrastive training on captioned images with learned data weights.

    Trains an image and a text tower on the generic pairs that a weighting network prefers, and learns that network so that
    images of the specific set find the captions of their classes. By default: glyphs with their Unicode names, and
    handwritten digits as the specific side.
    """

    name = "image_text"
    title = "Images and captions with learned data weights"
    config = ImageTextConfig
    measures: Sequence[Measure] = (
        Measure("accuracy", "accuracy", lower_is_better=False),
        Measure("loss", "loss", 3, "nats"),
        Measure("class_accuracy", "mean accuracy of the classes", lower_is_better=False),
    )
    presets: Mapping[str, Mapping[str, Any]] = {
        "default": {
            "study": {
                "run_dir": Path("runs/image_text"), "steps": 1500, "batch_size": 32, "big_batch_size": 256,
                "optimizer": {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup": 100},
            },
            **{name: {"weight_learning_rate": 1e-3, "entropy_bonus": 0.005, "shift_pull": 0.0} for name in LEARNING},
        },
        "atd": _ATD,
    }  # fmt: skip

    def open(self, config: ImageTextConfig, folder: Path) -> CaptionSplits:
        """Open, decode, pack and split the images, and embed their captions."""
        d = config.data
        columns = CaptionColumns(d.image_column, d.caption_column, d.class_column)
        with given_by("--data.generic"):
            generic = open_captions(d.generic, columns=columns._replace(category=None))
        if d.generic_labels is not None:
            generic = labelled_captions(generic, d.generic_labels)
        with given_by("--data.specific"):
            parts = open_specific_captions(
                d.specific, columns=columns, template=d.template, class_captions=d.class_captions,
                per_class=d.specific_per_class,
            )  # fmt: skip
        return _packed(d, *hold_out_captions(generic), parts)

    def model(self, config: ImageTextConfig, splits: CaptionSplits, options: ModelOptions) -> Model:
        """Build the towers."""
        name, d = options.network or config.model.network, config.data
        towers, classes, compared = _towers(config, options), splits.class_texts, splits.compared
        init = partial(init_image_text, towers, image_shape=(d.size, d.size, 3), dimensions=splits.rows.texts.shape[1])
        shapes, _ = jax.eval_shape(init, jax.random.key(0))
        plain, augmented = _preparations(d, splits)

        def loss(train: bool, prepare: Prepare = plain) -> LossFn:
            return image_text_loss(towers, classes, train=train, prepare=prepare, past=_PAST)

        def same_past(train: bool) -> LossFn:
            return with_past(loss(train), compared, past=_PAST)

        specific = same_past(True) if classes is None else class_caption_loss(towers, classes, prepare=plain)
        return Model(
            init,
            with_past(loss(True, augmented), compared, past=_PAST, always=False),
            specific,
            same_past(False),
            scoring=lambda statistics: scoring_loss(same_past, statistics=statistics),  # pyright: ignore[reportArgumentType]
            part=partial(last_image_blocks, params=shapes),
            describe=name,
        )

    def weighting(self, config: ImageTextConfig, splits: CaptionSplits) -> Weighting:
        """Build the weighting network over small images; it sees no captions."""
        m, size = config.model, config.data.small_size
        prepare = preparation(*splits.statistics, augment=False)
        init, logits = image_weighting((size, size, 3), prepare, features=m.weighting_features)
        return Weighting(init, bounded(logits, m.weighting_bound))

    def evaluate(self, config: ImageTextConfig, splits: CaptionSplits, model: Model) -> Evaluate:
        """Return accuracy and loss, means over rows, and the mean of the classes' accuracies.

        The caption of an image with a class is sought among those of all classes, that of another image in the past. For sets
        without classes both accuracies are the same.
        """
        classes = 1 if splits.class_texts is None else len(splits.class_texts)

        def sums(params: Params, model_state: ModelState, batch: Batch) -> dict[str, tuple[Array, Array]]:
            losses, aux = model.evaluation(params, model_state, batch, jax.random.key(0))
            mask, right = batch["mask"], aux.metrics["correct"] * batch["mask"]
            own = jnp.maximum(batch["label"], 0)
            of_class = jnp.zeros((2, classes)).at[:, own].add(jnp.stack([right, mask]))
            return {
                "accuracy": (right.sum(), mask.sum()),
                "loss": ((losses * mask).sum(), mask.sum()),
                "class_accuracy": (of_class[0], of_class[1]),
            }

        return evaluator(sums, model.at_once)

    def show(
        self, config: ImageTextConfig, splits: CaptionSplits, ids: NDArray[np.integer[Any]]
    ) -> Sequence[Text | Picture]:
        """Return generic images beside their captions as one picture, those with a known fault in red."""
        packed = splits.rows.packed
        fault = packed.labels.get("fault")
        wrong = [fault is not None and fault.names[fault.values[i]] != NO_FAULT for i in ids]
        captions = [packed.text(int(i)) for i in ids]
        return [Picture("", captioned(packed.images(ids), captions, np.asarray(wrong, bool)))]


def _packed(d: DataConfig, generic: CaptionSource, held_out: CaptionSource, parts: CaptionParts) -> CaptionSplits:
    """Decode the images, embed the captions, and tell the sets apart."""
    options = {"size": d.size, "small_size": d.small_size, "decode": d.decode, "cache_dir": d.cache_dir}
    images = {
        "train": pack_captions(generic, **options), "specific": pack_captions(parts.train, **options),
        "valid": pack_captions(parts.valid, **options), "generic": pack_captions(held_out, **options),
    }  # fmt: skip
    tested = {name: pack_captions(part, **options) for name, part in parts.test.items()}
    captions, counts = images["train"].captions(), images["train"].counts()
    embedding = open_embedding(
        d.embedding, captions, counts=counts, dimensions=d.text_dimensions, cache_dir=d.cache_dir
    )
    if parts.class_captions:
        note_close_captions(parts.class_captions, embedding)
    warn_of_shared_images([images["train"], images["specific"]], {"valid": images["valid"], **tested})
    embed = partial(embed_captions, embedding=embedding, text_type=d.text_type, cache_dir=d.cache_dir)
    sets = {name: embed(part) for name, part in images.items()}
    train, specific = sets["train"], sets["specific"]
    classes = embedding(parts.class_captions) if parts.class_captions else None
    return CaptionSplits(
        train=train,
        specific=specific,
        valid={"specific": sets["valid"], "generic": sets["generic"]},
        test={name: embed(part) for name, part in tested.items()},
        held_out=specific,  # irreducible is what a model of the specific images cannot predict
        known=known_labels(images["train"].labels, taught=d.known_faults),
        past=Past(lambda rows: rows.captions, d.past),
        small=lambda rows: rows.small,
        about=f"Generic: {d.generic}. Specific: {d.specific}, {len(parts.class_names)} classes. Captions: {_about(embedding)}. "
        f"Losses in nats. {images['train'].dropped()}",
        rows=train,
        class_texts=classes,
        compared=_compared(train, [] if parts.class_captions else [specific], d.past),
        statistics=image_statistics(images["train"]),
    )


def _about(embedding: TextEmbedding) -> str:
    return f"{embedding.name}, {embedding.dimensions} dimensions"


def _compared(train: CaptionRows, first: Sequence[CaptionRows], count: int) -> dict[str, NDArray[Any]]:
    """Distinct captions that losses are compared by: those of `first`, and generic ones evenly spread over all."""
    known = [(rows.texts, rows.packed.caption) for rows in (*first, train)]
    (texts, numbers), generic = known[0] if first else (known[-1][0][:0], known[-1][1][:0]), known[-1]
    texts, numbers = texts[:count], numbers[:count]
    more = min(count - len(texts), len(generic[0]))
    places = np.linspace(0, len(generic[0]) - 1, more).astype(np.int64)
    found = np.concatenate([texts, generic[0][places]]), np.concatenate([numbers, generic[1][places]])
    return {"text": found[0], "caption": found[1], "real": np.ones(len(found[1]), bool)}


def _towers(config: ImageTextConfig, options: ModelOptions) -> ImageText:
    m = config.model
    return image_text(
        options.network or m.network,
        size=config.data.size,
        width=m.width,
        hidden=m.text_hidden,
        dtype=jnp.dtype(options.dtype or m.dtype),
    )


def _preparations(d: DataConfig, splits: CaptionSplits) -> tuple[Prepare, Prepare]:
    """Images as the tower takes them, and the same augmented as the flags say."""
    plain = preparation(*splits.statistics, augment=False)
    if d.augment == "none":
        return plain, plain
    return plain, preparation(*splits.statistics, padding=d.padding, flip=d.augment == "crop_flip")


TASK = ImageTextTask()
