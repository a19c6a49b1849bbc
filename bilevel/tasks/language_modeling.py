"""Language modelling: a byte-level transformer, generic text and a small specific set (Grangier et al., ATD, section 5.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from bilevel.data import (
    DocumentRows,
    Pack,
    PackedText,
    RowView,
    cut_rows,
    given_by,
    open_source,
    open_specific,
    options_of,
    pack,
)
from bilevel.data.text.overlap import warn_of_overlap
from bilevel.nn.transformer import SIZES, Transformer, gathered_before, language_model_loss, last_blocks
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn
from bilevel.study import Evaluate, Known, Measure, Model, ModelOptions, Splits, Text, Weighting, mean_evaluator
from bilevel.training.settings import Count, free
from bilevel.types import Array, ModelState, Params, UserError

HELD_OUT_SHARE = 1 / 50
"""Share of the generic documents that is held out, by a hash of their text: sources that take turns are all in it."""
_EVALUATED_AT_ONCE = 256


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    generic: str = "python:stdlib"
    """Generic data: files, globs or folders (comma-separated; plain text, JSON lines, Parquet, Arrow, ArrayRecord, .npy or .npz,
    compressed or not, also by URL), folders that Hugging Face datasets saved, tfds:NAME[:SPLIT[:FIELD]], or python:stdlib, the
    source files of Python's standard library."""
    specific: str = "python:topics"
    """Specific data: a folder with train, valid and test files, or anything that --data.generic takes (then split 80/10/10
    by a hash of the text), or python:topics, Python's language reference."""
    generic_labels: str | None = None
    """Tab-separated file whose first column names the domain of each generic document, for analysis only."""
    generic_faults: str | None = None
    """Tab-separated file whose first column says of each generic document whether it is right (or 0) or wrong (1), nothing where
    that is not known: tables show the share of wrong rows that a method trains on, and mentornet learns from it."""
    field: str | None = None
    """Name of the field or column with the text (default: text), for those of the two data sets that have fields; meta.text is a
    field inside another, title,text are joined by a blank line."""
    documents: Literal["line", "file"] = "line"
    """Whether a line or a whole file of plain text is one document; for those of the two data sets that are plain text."""
    length: Count = 64
    """T: bytes in a row."""
    cache_dir: Path = free(Path("~/.cache/bilevel"))
    """Where packed data are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The main model and the weighting network."""

    network: Literal["xs", "small", "medium", "large"] = "xs"
    """Decoder: xs 2 layers/64, small 4/128 and large 12/256 (both the paper's), medium 6/256."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the main model's computation; parameters and losses stay float32."""
    remat: bool = False
    """Recompute blocks in the backward pass to save memory (on CPU only together with --model.scan-layers)."""
    scan_layers: bool = False
    """Compile one block for all layers: faster to compile when there are many."""
    dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Dropout of the main model in training (the paper: 0.1); evaluations and scores of rows are without."""
    weighting: Literal["conv", "ngram"] = "ngram"
    """Weighting network: convolutions over bytes, or a bag of hashed n-grams."""
    weighting_layers: Count = 1
    """Layers of the convolutional weighting network (the paper: 2)."""
    weighting_width: Count = 32
    """Width of the weighting network (the paper: 128)."""


@dataclass(frozen=True)
class LanguageConfig:
    """The settings of the task."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


_ATD: dict[str, Any] = {
    "extends": "paper",
    "study": {
        "compare": "uniform,mixing,contrastive,classifier,meta_weight_net,learning_to_reweight,dds,anograd,soba",
        "steps": 300_000, "batch_size": 128, "big_batch_size": 16_384, "run_dir": Path("runs/atd"),
        "optimizer": {"name": "adam", "learning_rate": 2e-3, "warmup": 1000},
        "log_every": 100, "evaluate_every": 2500, "checkpoint_every": 5000,
    },
    "task": {
        "data": {"length": 256},
        "model": {
            "network": "large", "dropout": 0.1, "weighting": "conv", "weighting_layers": 2, "weighting_width": 128,
        },
    },
}  # fmt: skip
"""Grangier et al., tables 1, 2 and 13. Ours, where the paper is silent: the bytes in a row; the schedule and b2 of Adam (those of
"default") and its warm-up, as in flax's language model, which the paper's is derived from."""


class LanguageModeling:
    """Language modelling with learned data weights.

    Trains a byte-level transformer on the generic text that a weighting network prefers, and learns that network so that the
    loss on the specific text falls. By default: Python's standard library, and its language reference.
    """

    name = "language_modeling"
    title = "Language modelling with learned data weights"
    config = LanguageConfig
    measures: Sequence[Measure] = (Measure("loss", "loss", 3, "nats per byte"),)
    presets: Mapping[str, Mapping[str, Any]] = {
        "default": {
            "study": {
                "run_dir": Path("runs/language_modeling"),
                "optimizer": {"name": "adam", "b2": 0.98, "learning_rate": 2e-3, "schedule": "cosine", "warmup": 100},
            }
        },
        "atd": _ATD,
    }

    def open(self, config: LanguageConfig, folder: Path) -> Splits:
        """Open, pack and split the text."""
        data, cache = config.data, config.data.cache_dir
        for_generic, for_specific = _source_options(data)
        with given_by("--data.generic"):
            source = open_source(data.generic, **for_generic)
        generic = pack(source, length=data.length, cache_dir=cache, labels=data.generic_labels)
        with given_by("--data.specific"):
            parts = open_specific(data.specific, **for_specific)
        specific = {name: pack(part, length=data.length, cache_dir=cache) for name, part in parts.items()}
        held_out = _held_out(generic)
        tested = {name: specific[name] for name in ("valid", "test")}
        warn_of_overlap((generic, specific["train"]), tested)
        known = {}
        if generic.labels is not None:
            known["domain"] = Known(np.asarray(generic.labels), tuple(generic.label_names))
        if data.generic_faults is not None:
            with given_by("--data.generic-faults"):
                faults = generic.faults(data.generic_faults)
            known["fault"] = Known(faults, ("right", "wrong"), fault=True, taught=True)
        return Splits(
            train=RowView(generic, np.flatnonzero(~held_out)),
            specific=specific["train"],
            valid={"specific": specific["valid"], "generic": RowView(generic, np.flatnonzero(held_out))},
            test={"specific": specific["test"]},
            held_out=specific["train"],  # irreducible is what a model of the specific text cannot predict
            known=known,
            about=f"Generic: {data.generic}. Specific: {data.specific}. Losses in nats per byte.",
        )

    def model(self, config: LanguageConfig, splits: Splits, options: ModelOptions) -> Model:
        """Build the transformer."""
        m, size = config.model, options.network or config.model.network
        if size not in SIZES:
            raise UserError(f'There is no language model "{size}": choose from {", ".join(SIZES)}.')
        shape = dataclasses.replace(
            SIZES[size], dtype=jnp.dtype(options.dtype or m.dtype), remat=m.remat, scan_layers=m.scan_layers,
            dropout=m.dropout,
        )  # fmt: skip
        if options.forward:
            shape = dataclasses.replace(shape, attention="xla")  # fused kernels have no forward mode
        gathers = options.mesh is not None and m.scan_layers
        model = Transformer(shape, options.mesh if gathers else None)
        tokens = jnp.zeros((1, config.data.length), jnp.uint8)
        loss = evaluation = language_model_loss(model)
        if m.dropout:  # else one and the same, so that a dense step scores its rows by its own losses
            evaluation = language_model_loss(model, train=False)

        def init(key: Array) -> tuple[Params, ModelState]:
            return Transformer(shape).init(key, tokens)["params"], {}

        return Model(
            init, loss, loss, evaluation, part=None if m.scan_layers else lambda count: last_blocks(count, shape),
            gather=gathered_before if gathers else None, describe=f"transformer {size}",
        )  # fmt: skip

    def weighting(self, config: LanguageConfig, splits: Splits | None) -> Weighting:
        """Build the weighting network over bytes."""
        m, length = config.model, config.data.length
        if m.weighting == "conv":
            module: Any = ConvWeighting(layers=m.weighting_layers, width=m.weighting_width)
        else:
            module = NGramWeighting(width=m.weighting_width, hidden=m.weighting_width)
        tokens, count = jnp.zeros((1, length), jnp.uint8), jnp.full((1,), length, jnp.int32)
        return Weighting(lambda key: module.init(key, tokens, count)["params"], logit_fn(module))

    def pack(self, config: LanguageConfig) -> Pack:
        """Return what cuts documents into windows of --data.length bytes, as in training."""

        def rows(documents: list[bytes], most: int) -> Iterator[DocumentRows]:
            for cut in cut_rows(documents, config.data.length, most):
                yield DocumentRows({"tokens": cut.tokens, "length": cut.length}, cut.owner, cut.length)

        return rows

    def evaluate(self, config: LanguageConfig, splits: Splits, model: Model) -> Evaluate:
        """Return the nats per byte of a data set: total nats over total bytes."""
        return mean_evaluator(model.evaluation, _EVALUATED_AT_ONCE, per="length")

    def show(self, config: LanguageConfig, splits: Splits, ids: NDArray[np.integer[Any]]) -> Sequence[Text]:
        """Return generic rows as texts, with their domain where it is known."""
        train = splits.train
        assert isinstance(train, RowView)
        assert isinstance(train.dataset, PackedText)
        domain = splits.known.get("domain")
        labels = [domain.names[domain.values[i]] if domain is not None else "" for i in ids]
        return [Text(0.0, label, train.dataset.text(int(i))) for i, label in zip(ids, labels, strict=True)]


def _held_out(generic: PackedText) -> NDArray[np.bool_]:
    """Which rows are held out: a 50th of the documents, those with the smallest hashes, and at least one."""
    hashes = np.asarray(generic.hash)
    held_out = hashes <= max(int(HELD_OUT_SHARE * 2**32), int(hashes.min()))
    if held_out.all():
        raise UserError(
            f"{generic.name} has {generic.manifest['document_count']} documents, too few different ones to hold some out: give "
            "more generic data (--data.generic), or cut them into more documents."
        )
    return held_out


def _source_options(data: DataConfig) -> list[dict[str, Any]]:
    """--data.field and --data.documents for the generic and for the specific data: where only one of them has fields, or is
    plain text, the flag concerns that one."""
    uses = []
    for flag, spec in (("--data.generic", data.generic), ("--data.specific", data.specific)):
        with given_by(flag):
            uses.append(options_of(spec))
    field, documents = (any(use[i] for use in uses) for i in range(2))
    return [
        {
            "field": data.field if use.field or not field else None,
            "documents": data.documents if use.documents or not documents else "line",
        }
        for use in uses
    ]


TASK = LanguageModeling()
