"""Language modelling: a decoder of bytes or tokens, generic text and a small specific set (Grangier et al., ATD, section 5.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from bilevel.data import (
    DocumentRows,
    Pack,
    PackedText,
    RowView,
    TextTokenizer,
    cut_rows,
    file_fingerprint,
    given_by,
    open_source,
    open_specific,
    open_text_tokenizer,
    options_of,
    pack,
)
from bilevel.data.text.joining import HELD_OUT_SHARE
from bilevel.data.text.overlap import warn_of_overlap
from bilevel.data.text.tokenizers import TOKENIZERS
from bilevel.nn.decoder import Decoder, DecoderConfig
from bilevel.nn.hugging_face import (
    CONFIG,
    config_of,
    files_beside,
    parameter_files,
    read_parameters,
    read_settings,
    write_folder,
)
from bilevel.nn.transformer import (
    SIZES,
    VOCABULARY,
    Transformer,
    gathered_before,
    language_model_loss,
    last_blocks,
    losses_of_tokens,
)
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn
from bilevel.selection.scorers import bounded
from bilevel.study import Evaluate, Known, Measure, Model, ModelOptions, Splits, Text, Weighting, evaluator
from bilevel.study.task import rows_at_once
from bilevel.training.settings import Count, free
from bilevel.types import Array, ModelState, Params, UserError


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
    prompt_field: str | None = None
    """Name of a field of JSON lines that holds a prompt: the text field is then the answer to it, and losses are of the answer
    alone; for those of the two data sets that have fields."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json of the library tokenizers, a sentencepiece .model file, or a folder with one of these."""
    length: Count = 64
    """T: bytes, or tokens, in a row."""
    crossing: bool = False
    """Let rows go on from one document to the next, with a token for its end between; else each is of one document."""
    cache_dir: Path = free(Path("~/.cache/bilevel"))
    """Where packed data are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The main model and the weighting network."""

    network: Literal["xs", "small", "medium", "large", "llama"] = "xs"
    """Decoder: xs 2 layers/64, small 4/128 and large 12/256 (both the paper's), medium 6/256; or llama, one that
    --model.start-from or --model.shape gives."""
    start_from: Path | None = free(None)
    """Folder of a Llama, Mistral, Qwen2 or Qwen3 in Hugging Face's layout (config.json, safetensors), whose parameters llama
    begins with."""
    shape: Path | None = free(None)
    """config.json of such a model, whose shape llama has while its parameters begin at random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the main model's computation; parameters and losses stay float32."""
    remat: bool = False
    """Recompute blocks in the backward pass to save memory (on CPU only together with --model.scan-layers)."""
    scan_layers: bool = False
    """Compile one block for all layers: faster to compile when there are many."""
    dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Dropout of the main model in training (the paper: 0.1); evaluations and scores of rows are without."""
    weighting: Literal["conv", "ngram"] = "ngram"
    """Weighting network: convolutions over bytes or tokens, or a bag of hashed n-grams."""
    weighting_layers: Count = 1
    """Layers of the convolutional weighting network (the paper: 2)."""
    weighting_width: Count = 32
    """Width of the weighting network (the paper: 128)."""
    weighting_bound: NonNegativeFloat = 25.0
    """Logits are squashed into ± this bound; 0: no bound, as in the paper."""


@dataclass(frozen=True)
class LanguageConfig:
    """The settings of the task."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class TextSplits(Splits):
    """The text, and what cuts it into tokens."""

    tokenizer: TextTokenizer | None
    """None: bytes."""
    started: Mapping[str, str]
    """What the main model begins with, digested."""

    @property
    def hashes(self) -> dict[str, str]:
        """The content hash of each set, and of the model's first parameters."""
        return {**super().hashes, **self.started}


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
        "model": {"network": "large", "dropout": 0.1, "weighting": "conv", "weighting_layers": 2, "weighting_width": 128},
    },
}  # fmt: skip
"""Grangier et al., tables 1, 2 and 13. Ours, where the paper is silent: the bytes in a row; the schedule and b2 of Adam (those of
"default") and its warm-up, as in flax's language model, which the paper's is derived from."""


class LanguageModeling:
    """Language modelling with learned data weights.

    Trains a decoder, of bytes by default, on the generic text that a weighting network prefers, and learns that network so that
    the loss on the specific text falls. By default: Python's standard library, and its language reference.
    """

    name = "language_modeling"
    title = "Language modelling with learned data weights"
    config = LanguageConfig
    measures: Sequence[Measure] = (
        Measure("loss", "loss", 3, "nats per byte"),
        Measure("token_loss", "loss of a token", 3, "nats per token"),
    )
    presets: Mapping[str, Mapping[str, Any]] = {
        "default": {"study": {
            "run_dir": Path("runs/language_modeling"),
            "optimizer": {"name": "adam", "b2": 0.98, "learning_rate": 2e-3, "schedule": "cosine", "warmup": 100},
        }},
        "paper": {"task": {"model": {"weighting_bound": 0.0}}},
        "atd": _ATD,
    }  # fmt: skip

    def open(self, config: LanguageConfig, folder: Path) -> TextSplits:
        """Open, pack and split the text."""
        data = config.data
        if data.crossing and data.prompt_field is not None:
            raise UserError(
                "--data.crossing does not go with --data.prompt-field: rows of prompts are of one document."
            )
        tokenizer, started = open_text_tokenizer(data.tokenizer), _started(config)
        how: dict[str, Any] = {
            "length": data.length, "cache_dir": data.cache_dir, "tokenizer": tokenizer,
            "prompts": data.prompt_field is not None, "crossing": data.crossing,
        }  # fmt: skip
        for_generic, for_specific = _source_options(data)
        with given_by("--data.generic"):
            source = open_source(data.generic, **for_generic)
        generic = pack(source, labels=data.generic_labels, **how)
        with given_by("--data.specific"):
            parts = open_specific(data.specific, **for_specific)
        specific = {name: pack(part, **how) for name, part in parts.items()}
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
        return TextSplits(
            train=RowView(generic, np.flatnonzero(~held_out)),
            specific=specific["train"],
            valid={"specific": specific["valid"], "generic": RowView(generic, np.flatnonzero(held_out))},
            test={"specific": specific["test"]},
            held_out=specific["train"],  # irreducible is what a model of the specific text cannot predict
            known=known,
            about=f"Generic: {data.generic}. Specific: {data.specific}. Losses in nats per byte.",
            tokenizer=tokenizer,
            started=started,
        )

    def model(self, config: LanguageConfig, splits: TextSplits | None, options: ModelOptions) -> Model:
        """Build the decoder."""
        tokenizer = _tokenizer(config, splits)
        m, size = config.model, options.network or config.model.network
        gathers = options.mesh is not None and m.scan_layers
        how: dict[str, Any] = {
            "dtype": jnp.dtype(options.dtype or m.dtype), "remat": m.remat, "scan_layers": m.scan_layers,
            "dropout": m.dropout, "attention": "xla" if options.forward else "auto",  # fused kernels have no forward mode
        }  # fmt: skip
        start = None
        if size == "llama":
            shape: Any = dataclasses.replace(_llama(config, tokenizer), **how)
            network: Any = Decoder
            if (folder := m.start_from) is not None:
                start = partial(read_parameters, folder, shape)
        elif size in SIZES:
            network, vocabulary = Transformer, _vocabulary(tokenizer)
            shape = dataclasses.replace(SIZES[size], vocabulary=vocabulary, **how)
        else:
            raise UserError(f'There is no language model "{size}": choose from {", ".join(SIZES)}, llama.')
        model = network(shape, options.mesh if gathers else None)
        tokens = jnp.zeros((1, config.data.length), jnp.int32)
        loss = evaluation = language_model_loss(model)
        if m.dropout:  # else one and the same, so that a dense step scores its rows by its own losses
            evaluation = language_model_loss(model, train=False)

        def init(key: Array) -> tuple[Params, ModelState]:
            return network(shape).init(key, tokens)["params"], {}

        return Model(
            init, loss, loss, evaluation, part=None if m.scan_layers else lambda count: last_blocks(count, shape),
            tokens=lambda train: losses_of_tokens(model, train=train),
            gather=gathered_before if gathers else None, describe=f"transformer {size}", start=start,
            at_once=rows_at_once(config.data.length, _vocabulary(tokenizer)),
        )  # fmt: skip

    def weighting(self, config: LanguageConfig, splits: TextSplits | None) -> Weighting:
        """Build the weighting network over bytes or tokens."""
        m, length = config.model, config.data.length
        size: Any = {"width": m.weighting_width, "vocabulary": _vocabulary(_tokenizer(config, splits))}
        ngram = m.weighting == "ngram"
        module = (
            NGramWeighting(hidden=m.weighting_width, **size) if ngram else ConvWeighting(m.weighting_layers, **size)
        )
        tokens, count = jnp.zeros((1, length), jnp.int32), jnp.full((1,), length, jnp.int32)
        logits = bounded(logit_fn(module), m.weighting_bound)
        return Weighting(lambda key: module.init(key, tokens, count)["params"], logits)

    def pack(self, config: LanguageConfig) -> Pack:
        """Return what cuts documents into windows of --data.length bytes or tokens, as in training."""
        tokenizer = open_text_tokenizer(config.data.tokenizer)

        def rows(documents: list[bytes], most: int) -> Iterator[DocumentRows]:
            for cut in cut_rows(documents, config.data.length, most, tokenizer=tokenizer):
                yield DocumentRows({"tokens": cut.tokens, "length": cut.length}, cut.owner, cut.size)

        return rows

    def export(self, config: LanguageConfig, splits: TextSplits, params: Params, folder: Path, dtype: str) -> None:
        """Write a model in Hugging Face's layout, with the tokenizer's files of the model that it began with."""
        m = config.model
        place = m.start_from or m.shape
        if m.network != "llama" or place is None:
            raise UserError(
                f"the network {m.network} has no layout that others read: train with --model.network llama."
            )
        write_folder(folder, read_settings(place), params, dtype=dtype, beside=files_beside(place))

    def evaluate(self, config: LanguageConfig, splits: TextSplits, model: Model) -> Evaluate:
        """Return the nats per byte of a data set, total nats over total bytes, and per token where these are not bytes."""

        def sums(params: Params, model_state: ModelState, batch: Any) -> dict[str, tuple[Array, Array]]:
            losses, _ = model.evaluation(params, model_state, batch, jax.random.key(0))
            count = (batch["length"] - batch.get("given", 0)) * batch["mask"]
            nats, found = (losses * count).sum(), {}
            if splits.tokenizer is not None or config.data.crossing:
                found["token_loss"] = (nats, count.sum())
            return {"loss": (nats, (batch.get("size", batch["length"]) * batch["mask"]).sum())} | found

        return evaluator(sums, model.at_once)

    def show(self, config: LanguageConfig, splits: Splits, ids: NDArray[np.integer[Any]]) -> Sequence[Text]:
        """Return generic rows as texts, with their domain where it is known."""
        train = splits.train
        assert isinstance(train, RowView)
        assert isinstance(train.dataset, PackedText)
        domain = splits.known.get("domain")
        labels = [domain.names[domain.values[i]] if domain is not None else "" for i in ids]
        return [Text(0.0, label, train.dataset.text(int(i))) for i, label in zip(ids, labels, strict=True)]


def _tokenizer(config: LanguageConfig, splits: TextSplits | None) -> TextTokenizer | None:
    return open_text_tokenizer(config.data.tokenizer) if splits is None else splits.tokenizer


def _vocabulary(tokenizer: TextTokenizer | None) -> int:
    return VOCABULARY if tokenizer is None else tokenizer.size


def _started(config: LanguageConfig) -> dict[str, str]:
    """Digest the files of the model that --model.start-from or --model.shape names, by their sizes and samples."""
    m = config.model
    if m.network != "llama" and (m.start_from is not None or m.shape is not None):
        flag = "--model.shape" if m.start_from is None else "--model.start-from"
        raise UserError(f"{flag} is for --model.network llama, not {m.network}: give both, or omit it.")
    files = [] if m.shape is None else [m.shape]
    if m.start_from is not None:
        with given_by("--model.start-from"):
            files = [m.start_from / CONFIG, *parameter_files(m.start_from)]
    return {f"start_{file.name}": file_fingerprint(file, times=False) for file in files if file.is_file()}


def _llama(config: LanguageConfig, tokenizer: TextTokenizer | None) -> DecoderConfig:
    """The shape that --model.start-from or --model.shape gives, if the rows fit it."""
    m, data = config.model, config.data
    place = m.start_from or m.shape
    if place is None or (m.start_from and m.shape):
        found = "neither" if place is None else "both"
        raise UserError(
            f"--model.network llama and {found} of --model.start-from and --model.shape: give one of these."
        )
    shape = config_of(read_settings(place), str(place))
    own = [file.name for file in files_beside(place) if file.name in TOKENIZERS]
    if m.start_from is not None and tokenizer is None and own:
        raise UserError(f"The model in {place} has a tokenizer, {own[0]}: give --data.tokenizer {place}.")
    if shape.vocabulary < _vocabulary(tokenizer):
        raise UserError(
            f"The model in {place} knows {shape.vocabulary:,} tokens, and --data.tokenizer {data.tokenizer} has "
            f"{_vocabulary(tokenizer):,}: give the model's own as --data.tokenizer."
        )
    if shape.longest is not None and data.length > shape.longest:
        raise UserError(
            f"--data.length {data.length} is more than the {shape.longest} tokens that the model in {place} sees."
        )
    return shape


def _held_out(generic: PackedText) -> NDArray[np.bool_]:
    """Which rows are held out: of a 50th of the documents, those with the smallest hashes, and of at least one."""
    hashes = np.asarray(generic.hash)
    least = 0 if generic.manifest["crossing"] else int(hashes.min())
    held_out = hashes <= max(int(HELD_OUT_SHARE * 2**32), least)
    if held_out.all() or not held_out.any():
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
    found = []
    for use in uses:
        of_field = (data.field, data.prompt_field) if use.field or not field else (None, None)
        lines = data.documents if use.documents or not documents else "line"
        found.append({"field": of_field[0], "prompt": of_field[1], "documents": lines})
    return found


TASK = LanguageModeling()
