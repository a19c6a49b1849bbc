"""Translation: an encoder–decoder, generic sentence pairs and a small specific set (Grangier et al., ATD, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from bilevel.data import (
    Dataset,
    LanguageRows,
    PackedPairs,
    PairParts,
    PairSource,
    PairTokenizer,
    given_by,
    hold_out,
    labelled_pairs,
    open_pairs,
    open_specific_pairs,
    open_tokenizer,
    pack_languages,
    pack_pairs,
    warn_of_shared_pairs,
)
from bilevel.data.streams import NO_FAULT
from bilevel.nn.translation.base import EncoderDecoder
from bilevel.nn.translation.beam_search import gnmt
from bilevel.nn.translation.losses import translation_loss
from bilevel.nn.translation.recurrent import RecurrentConfig, decoder_part, recurrent
from bilevel.nn.translation.transformer import SIZES, TranslatorConfig, last_blocks, transformer
from bilevel.nn.translation.weighting import PairWeighting, pair_logits
from bilevel.offline.translations import chance_of_difference, scored, signature, translator
from bilevel.selection.known import known_labels
from bilevel.selection.scorers import bounded
from bilevel.study import (
    Evaluate,
    Known,
    Measure,
    Model,
    ModelOptions,
    ParamFilter,
    SourceLanguages,
    Splits,
    Text,
    Weighting,
)
from bilevel.study.task import Write, mean_evaluator, rows_at_once
from bilevel.training.settings import Count, free
from bilevel.types import Batch, ModelState, Params, UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the sentence pairs come from; docs/pairs.md lists what is read."""

    generic: str = "python:catalogues"
    """Generic pairs: two aligned files (train.{en,cs}.gz), TSV, JSON lines, Parquet, .po or .mo catalogues, a folder of these
    (comma-separated), tfds:NAME[:SPLIT], or python:catalogues, translations that come with Python packages."""
    specific: str = "python:interface"
    """Specific pairs: a folder with train, valid and test files, or anything that --data.generic takes (then split 80/10/10 by a
    hash of the source sentence), or python:interface, messages of programs."""
    source_language: str = "en"
    """Language that is translated from, as the files or columns call it; several (az,tr,be), for which rows are grouped by their
    target sentence, so that methods may draw the language of each target."""
    specific_language: str | None = None
    """Of several source languages the one that the model is for; none given: the first."""
    target_language: str = "fr"
    """Language that is translated to."""
    columns: tuple[str, str] | None = None
    """Names of the source and the target column of tables, where these are not called by the languages."""
    generic_labels: str | None = None
    """Tab-separated file with the domain of each generic pair, and perhaps its fault (none, copied, …) in a second column, for
    analysis only."""
    known_faults: bool = False
    """Let methods learn from the faults in --data.generic-labels (mentornet does)."""
    tokenizer: str = "unigram"
    """Sentencepiece model that is trained on the generic pairs: unigram or bpe; or a .model file."""
    vocabulary: Count = 2000
    """V: pieces of a tokenizer that is trained, of both languages together; of several source languages, at most so many each,
    merged by their strings."""
    length: Count = 32
    """S = T: most pieces of a sentence; pairs with a longer one are dropped, and counted."""
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    """Drop pairs of which one side has more than so many times the pieces of the other."""
    drop_copies: bool = False
    """Drop pairs whose target is the source."""
    drop_repeats: bool = False
    """Drop pairs that stood there before."""
    cache_dir: Path = free(Path("~/.cache/bilevel"))
    """Where tokenizers and packed pairs are kept."""


@dataclass(frozen=True)
class ModelConfig:
    """The main model and the weighting network."""

    network: Literal["xs", "small", "base", "big", "lstm"] = "xs"
    """Transformer: xs 2 + 2 layers of width 64, small 3 + 3 of 256, base 6 + 6 of 512, big 6 + 6 of 1024 (the paper's); or lstm,
    a recurrent encoder–decoder with attention."""
    hidden: Count = 256
    """Units of the lstm, and of each direction of its encoder."""
    embedding: Count = 128
    """Width of the lstm's embedded pieces."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the main model's computation; parameters and losses stay float32."""
    dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.1
    """Dropout of the main model in training; evaluations and scores of rows are without."""
    smoothing: Annotated[NonNegativeFloat, Field(lt=1)] = 0.1
    """Label smoothing."""
    weigh_pieces: bool = False
    """Let every piece count alike in training, so that long pairs count more; else every pair counts alike."""
    weighting_width: Count = 32
    """Width of the weighting network's embedded pieces."""
    weighting_hidden: Count = 128
    """Units of its hidden layer."""
    weighting_bound: NonNegativeFloat = 25.0
    """Logits are squashed into ± this bound; 0: no bound, as in the paper."""
    beam: Count = 4
    """Hypotheses in the search for a translation."""
    length_penalty: NonNegativeFloat = 0.6
    """Hypotheses that ended are compared by their log-probability over ((5 + n)/6) to this power, n pieces long."""
    bleu_tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """How sacrebleu cuts text into words; none for text that is tokenised already."""


@dataclass(frozen=True)
class TranslationConfig:
    """The settings of the task."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


class _Shape(NamedTuple):
    """A network, and the part of it that cheap probes take."""

    network: EncoderDecoder
    part: Callable[[int], ParamFilter]
    describe: str


@dataclass(frozen=True, kw_only=True)
class PairSplits(Splits):
    """The pairs, and what cuts sentences into pieces."""

    source: PairTokenizer
    target: PairTokenizer


_ATD: dict[str, Any] = {
    "extends": "paper",
    "study": {
        "compare": "uniform,mixing,contrastive,classifier,meta_weight_net,learning_to_reweight,dds,anograd,soba",
        "steps": 500_000, "batch_size": 256, "big_batch_size": 2048, "run_dir": Path("runs/atd_translation"),
        "optimizer": {"name": "adam", "b2": 0.98, "learning_rate": 2e-4, "schedule": "rsqrt", "warmup": 1000},
        "log_every": 100, "evaluate_every": 2500, "checkpoint_every": 5000,
    },
    "task": {"data": {"vocabulary": 32_000, "length": 128, "target_language": "de"}, "model": {"network": "big"}},
}  # fmt: skip
"""Grangier et al., tables 1, 4 and 14. Ours, where the paper is silent: the pieces in a row."""


class Translation:
    """Translation with learned data weights.

    Trains an encoder–decoder on the generic sentence pairs that a weighting network prefers, and learns that network so that the
    loss on the specific pairs falls. By default: names, emoji and messages from the catalogues of Python packages, English to
    French, and the messages of three words or more as the specific side.
    """

    name = "translation"
    title = "Translation with learned data weights"
    config = TranslationConfig
    measures: Sequence[Measure] = (
        Measure("loss", "loss", 3, "nats per piece"),
        Measure("nll", "NLL", 3, "nats per piece"),
    )
    judged: Sequence[Measure] = (
        Measure("bleu", "BLEU", 2, lower_is_better=False),
        Measure("chrf", "chrF", 2, lower_is_better=False),
    )
    presets: Mapping[str, Mapping[str, Any]] = {
        "default": {
            "study": {
                "run_dir": Path("runs/translation"), "steps": 1500, "batch_size": 32, "big_batch_size": 512,
                "optimizer": {"name": "adam", "b2": 0.98, "learning_rate": 2e-3, "schedule": "cosine", "warmup": 200},
            }
        },
        "paper": {"task": {"model": {"weighting_bound": 0.0}}},
        "atd": _ATD,
    }  # fmt: skip

    def open(self, config: TranslationConfig, folder: Path) -> PairSplits:
        """Open, tokenise, pack and split the pairs."""
        d = config.data
        names = [name.strip() for name in d.source_language.split(",")]
        return (
            _open_one(d, self.signature(config))
            if len(names) == 1
            else _open_several(config, names, self.signature(config))
        )

    def model(self, config: TranslationConfig, splits: PairSplits, options: ModelOptions) -> Model:
        """Build the encoder–decoder."""
        m, (network, part, describe) = config.model, _network(config, splits, options)
        mean = _mean_pieces(splits.train) if m.weigh_pieces else None
        loss = translation_loss(network, train=True, smoothing=m.smoothing, pieces_a_row=mean)
        evaluation = loss
        if m.dropout or m.weigh_pieces:  # else one and the same, so that a dense step scores its rows by its own losses
            evaluation = translation_loss(network, train=False, smoothing=m.smoothing)
        shape = _empty(config)
        at_once = rows_at_once(config.data.length, splits.target.size)
        return Model(
            lambda key: (network.init(key, shape), {}), loss, loss, evaluation, part=part, describe=describe, at_once=at_once
        )  # fmt: skip

    def weighting(self, config: TranslationConfig, splits: PairSplits) -> Weighting:
        """Build the weighting network over bags of pieces."""
        m = config.model
        module = PairWeighting(
            max(splits.source.size, splits.target.size), width=m.weighting_width, hidden=m.weighting_hidden
        )
        empty = _empty(config)
        sides = [empty[name] for name in ("source", "source_length", "target", "target_length")]
        logits = bounded(pair_logits(module), m.weighting_bound)
        return Weighting(lambda key: module.init(key, *sides)["params"], logits)

    def evaluate(self, config: TranslationConfig, splits: PairSplits, model: Model) -> Evaluate:
        """Return the nats per piece of a data set, with smoothed labels and without: totals over the pieces."""
        return mean_evaluator(model.evaluation, model.at_once, per="target_length", nll="nll")

    def write(self, config: TranslationConfig, splits: PairSplits, model: Model) -> Write:
        """Return what translates all rows of a data set by beam search."""
        m = config.model
        network = _network(config, splits, ModelOptions()).network
        translate = translator(network, beam=m.beam, most=config.data.length, penalty=gnmt(m.length_penalty))

        def written(params: Params, model_state: ModelState, rows: Dataset) -> list[str]:
            return splits.target.decode(translate(params, rows))

        return written

    def judge(
        self, config: TranslationConfig, splits: PairSplits, rows: PackedPairs, texts: Sequence[str]
    ) -> dict[str, float]:
        """Return BLEU and chrF of translations."""
        found = scored(texts, rows.targets(), config.model.bleu_tokenize)
        return {"bleu": found.bleu, "chrf": found.chrf}

    def chance(
        self,
        config: TranslationConfig,
        splits: PairSplits,
        rows: PackedPairs,
        baseline: Sequence[str],
        texts: Sequence[str],
    ) -> Mapping[str, float]:
        """Return the p values of sacrebleu's paired bootstrap test."""
        return chance_of_difference(baseline, texts, rows.targets(), config.model.bleu_tokenize)

    def signature(self, config: TranslationConfig) -> str:
        """Return how BLEU and chrF are measured, in sacrebleu's words, and the search."""
        m = config.model
        return f"BLEU: {signature(m.bleu_tokenize)}; beam {m.beam}, length penalty {m.length_penalty}."

    def show(self, config: TranslationConfig, splits: PairSplits, ids: NDArray[np.integer[Any]]) -> Sequence[Text]:
        """Return generic pairs as texts, with their domain and fault where these are known."""
        train: Any = splits.train
        labels = [[k.names[k.values[i]] for k in splits.known.values() if not k.fault] for i in ids]
        faults = train.labels.get("fault") if isinstance(train, PackedPairs) else None
        for i, row in zip(ids, labels, strict=True):
            if faults is not None and faults.names[faults.values[i]] != NO_FAULT:
                row.append(faults.names[faults.values[i]])
        return [Text(0.0, ", ".join(row), " ⇒ ".join(train.text(int(i)))) for i, row in zip(ids, labels, strict=True)]


def _open_one(d: DataConfig, signature: str) -> PairSplits:
    """One source language: generic pairs, of which a share is held out, and specific ones."""
    generic: PairSource = _opened(d, "generic", d.source_language)
    parts: PairParts = _opened(d, "specific", d.source_language)
    if d.generic_labels is not None:
        generic = labelled_pairs(generic, d.generic_labels)
    generic, held_out = hold_out(generic)
    tokenizer = open_tokenizer(d.tokenizer, generic, vocabulary=d.vocabulary, cache_dir=d.cache_dir)
    options = _packing(d)
    train, specific, valid, other = (
        pack_pairs(source, tokenizer, **options) for source in (generic, parts.train, parts.valid, held_out)
    )
    test = {name: pack_pairs(part, tokenizer, **options) for name, part in parts.test.items()}
    warn_of_shared_pairs([train, specific], {"valid": valid, **test})
    return PairSplits(
        train=train,
        specific=specific,
        valid={"specific": valid, "generic": other},
        test=test,
        held_out=specific,  # irreducible is what a model of the specific pairs cannot predict
        known=known_labels(train.labels, taught=d.known_faults),
        about=f"Generic: {d.generic}. Specific: {d.specific}. {d.source_language} to {d.target_language}; losses in nats per "
        f"piece, {tokenizer.size:,} pieces. {signature} {train.dropped()}",
        source=tokenizer,
        target=tokenizer,
    )


def _open_several(config: TranslationConfig, names: Sequence[str], signature: str) -> PairSplits:
    """Several source languages: all of their training pairs, and dev and test of the specific language."""
    d = config.data
    specific = d.specific_language or names[0]
    if d.generic_labels is not None or d.known_faults:
        raise UserError("--data.generic-labels and --data.known-faults go with one --data.source-language: omit them.")
    data = pack_languages(
        {name: _opened(d, "generic", name) for name in names}, specific, _opened(d, "specific", specific),
        shared=config.model.network != "lstm", tokenizer=d.tokenizer, vocabulary=d.vocabulary, **_packing(d),
    )  # fmt: skip
    warn_of_shared_pairs([*data.train.pairs.values()], {"valid": data.valid, **data.test})
    return PairSplits(
        train=data.train,
        specific=data.specific,
        valid={"specific": data.valid},
        test=data.test,
        held_out=data.specific,
        known={"language": Known(data.train.languages, tuple(data.train.parts))},
        languages=SourceLanguages(data.train.table, specific, data.train.sentences),
        about=f"{', '.join(names)} to {d.target_language}, {d.generic}; for {specific}, {d.specific}. Losses in nats per piece, "
        f"{data.target.size:,} pieces. {signature}",
        source=data.source,
        target=data.target,
    )


def _opened(d: DataConfig, what: Literal["generic", "specific"], language: str) -> Any:
    """The generic pairs of a source language, as a stream, or the specific ones, in parts."""
    opener = open_pairs if what == "generic" else open_specific_pairs
    with given_by(f"--data.{what}"):
        return opener(getattr(d, what), source_language=language, target_language=d.target_language, columns=d.columns)


def _packing(d: DataConfig) -> dict[str, Any]:
    names = ("length", "cache_dir", "max_ratio", "drop_copies", "drop_repeats")
    return {name: getattr(d, name) for name in names}


def _network(config: TranslationConfig, splits: PairSplits, options: ModelOptions) -> _Shape:
    m, size = config.model, options.network or config.model.network
    dtype = jnp.dtype(options.dtype or m.dtype)
    if size == "lstm":
        shape = RecurrentConfig(
            splits.source.size,
            splits.target.size,
            hidden=m.hidden,
            embedding=m.embedding,
            dropout=m.dropout,
            dtype=dtype,
        )
        return _Shape(recurrent(shape), lambda count: decoder_part, f"lstm {m.hidden}")
    if size not in SIZES:
        raise UserError(f'There is no translation model "{size}": choose from {", ".join([*SIZES, "lstm"])}.')
    transformed = TranslatorConfig(
        splits.target.size, **SIZES[size], dropout=m.dropout, dtype=dtype, fused=not options.forward
    )
    return _Shape(transformer(transformed), lambda count: last_blocks(count, transformed), f"transformer {size}")


def _empty(config: TranslationConfig) -> Batch:
    """A batch of one pair, for shapes."""
    pieces, length = jnp.zeros((1, config.data.length), jnp.int32), jnp.ones((1,), jnp.int32)
    return {"source": pieces, "source_length": length, "target": pieces, "target_length": length}


def _mean_pieces(rows: Any) -> float:
    parts = rows.pairs.values() if isinstance(rows, LanguageRows) else [rows]
    return float(np.concatenate([np.diff(part.starts)[1::2] for part in parts]).mean())


TASK = Translation()
