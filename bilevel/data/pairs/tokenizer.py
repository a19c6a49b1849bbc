"""Tokenizers: sentencepiece models, trained on the generic training text or brought by the user."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import digest
from bilevel.data.opening import exists, open_bytes, place_of
from bilevel.data.pairs.stream import PairSource
from bilevel.data.sentencepieces import processor_of, sentencepiece
from bilevel.types import UserError

PAD, UNK, EOS = 0, 1, 2
_SPECIAL = 3
"""Pieces that stand for no text: pad, unk and eos."""
_FORMAT_VERSION = 1
_MOST_SENTENCES = 2_000_000
"""Sentences that a model is trained on; of more, a random choice (with a fixed seed)."""
_LARGEST = re.compile(r"value <= (\d+)")
_SMALLEST = re.compile(r"required_chars\. \d+ vs (\d+)")
_UNKNOWN = " ⁇ "
_SPACE = "▁"

ModelKind = Literal["unigram", "bpe"]
Side = Literal["both", "source", "target"]


class PairTokenizer(Protocol):
    """What packing and the evaluation need of a tokenizer. Pieces are numbers from 0: pad 0, unk 1, eos 2."""

    @property
    def size(self) -> int:
        """V, the number of pieces."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the model."""
        ...

    def encode(self, texts: Sequence[str], /) -> list[list[int]]:
        """Return the pieces of each text, without eos."""
        ...

    def decode(self, rows: Iterable[Sequence[int] | NDArray[np.integer[Any]]], /) -> list[str]:
        """Return the text of each row of pieces up to its eos; pads do not count."""
        ...


class Tokenizer:
    """A sentencepiece model.

    Args:
        model: the bytes of a `.model` file.
        name: for messages.

    Raises:
        UserError: it is no such model, or its special pieces are others.
    """

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        self._processor = processor_of(model, name, "unigram or bpe")
        found = tuple(getattr(self._processor, f"{special}_id")() for special in ("pad", "unk", "eos"))
        if found != (PAD, UNK, EOS):
            raise UserError(
                f"{name} has pad, unk and eos at {', '.join(map(str, found))}; train it with pad_id=0, unk_id=1, eos_id=2 and "
                "bos_id=-1, or give unigram or bpe as --data.tokenizer."
            )
        self.name = name
        self.size: int = self._processor.get_piece_size()
        self.fingerprint = digest([model])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the pieces of each text, without eos."""
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, rows: Iterable[Sequence[int] | NDArray[np.integer[Any]]]) -> list[str]:
        """Return the text of each row of pieces up to its eos; pads do not count. Unknown pieces are ` ⁇ `."""
        cut = [_real(row) for row in rows]
        return self._processor.decode(cut) if cut else []

    def pieces(self) -> list[str]:
        """Return the string of each piece; `▁` stands for a space."""
        return [self._processor.id_to_piece(number) for number in range(self.size)]


class MergedVocabulary:
    """The vocabularies of several languages as one, in which pieces with the same string are the same.

    So kin languages share embeddings. Pieces that stand for no text come first, and then those of each language, in order,
    that no language before it has.

    Args:
        tokenizers: by language.
    """

    def __init__(self, tokenizers: Mapping[str, Tokenizer]):
        first = next(iter(tokenizers.values()))
        numbers: dict[str, int] = {piece: number for number, piece in enumerate(first.pieces()[:_SPECIAL])}
        self._maps: dict[str, NDArray[np.int32]] = {}
        for language, tokenizer in tokenizers.items():
            special = list(range(_SPECIAL))
            own = [numbers.setdefault(piece, len(numbers)) for piece in tokenizer.pieces()[_SPECIAL:]]
            self._maps[language] = np.array(special + own, np.int32)
        self._tokenizers = dict(tokenizers)
        self.pieces = tuple(numbers)
        """The strings of all pieces, in order."""

    def of(self, language: str) -> LanguageTokenizer:
        """Return the tokenizer of a language, whose numbers are those of the merged vocabulary."""
        return LanguageTokenizer(self._tokenizers[language], self._maps[language], self.pieces)


class LanguageTokenizer:
    """A tokenizer whose pieces are numbered as in a `MergedVocabulary`, which makes it."""

    def __init__(self, tokenizer: Tokenizer, numbers: NDArray[np.int32], pieces: tuple[str, ...]):
        self.name = tokenizer.name
        self.numbers = numbers
        """int32 `[pieces of the language]`: their numbers in the merged vocabulary."""
        self.size = len(pieces)
        self.fingerprint = digest([tokenizer.fingerprint, *pieces])
        self._tokenizer = tokenizer
        self._pieces = pieces

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the pieces of each text, without eos."""
        numbers = self.numbers.tolist()
        return [[numbers[piece] for piece in row] for row in self._tokenizer.encode(texts)]

    def decode(self, rows: Iterable[Sequence[int] | NDArray[np.integer[Any]]]) -> list[str]:
        """Return the text of each row of pieces up to its eos, whatever language they are of."""
        texts = ("".join(self._pieces[i] if i != UNK else _UNKNOWN for i in _real(row)) for row in rows)
        return [text.removeprefix(_SPACE).replace(_SPACE, " ") for text in texts]


def _real(row: Sequence[int] | NDArray[np.integer[Any]]) -> list[int]:
    numbers = np.asarray(row, np.int64).tolist()
    end = numbers.index(EOS) if EOS in numbers else len(numbers)
    return [number for number in numbers[:end] if number != PAD]


def train_tokenizer(
    source: PairSource,
    *,
    cache_dir: str | Path,
    vocabulary: int = 2000,
    kind: ModelKind = "unigram",
    side: Side = "both",
    at_most: bool = False,
) -> Tokenizer:
    """Train a sentencepiece model and keep it in `cache_dir`; a second call only opens it.

    The same text and settings give the same model.

    Args:
        source: the generic pairs that are trained on, those held out excepted.
        cache_dir: made if it does not exist.
        vocabulary: V, the number of pieces, with pad, unk and eos.
        kind: unigram or bpe.
        side: the text of both sides (one joint vocabulary), or of one.
        at_most: take fewer pieces where the text does not give as many (unigram only).

    Raises:
        UserError: the vocabulary is larger than the text allows, or smaller than its letters need; or as reading the source.
    """
    key = digest(["tokenizer", _FORMAT_VERSION, vocabulary, kind, side, at_most, source.fingerprint()])
    file = "tokenizer.model"

    def opened(folder: Path) -> Tokenizer:
        try:
            return Tokenizer((folder / file).read_bytes(), f"the tokenizer of {source.name}")
        except OSError as error:
            raise UserError(f"The tokenizer in {folder} is damaged ({error}); remove the folder.") from error

    def write(folder: Path) -> None:
        (folder / file).write_bytes(_train(source, vocabulary, kind, side, at_most))

    return cached_folder(
        Path(cache_dir) / f"{kind}-{vocabulary}-{key}",
        opened,
        write,
        work=f"Training a tokenizer on {source.name}",
    )


def open_tokenizer(
    spec: str,
    source: PairSource,
    *,
    cache_dir: str | Path,
    vocabulary: int = 2000,
    side: Side = "both",
    at_most: bool = False,
) -> Tokenizer:
    """Open a `.model` file, or train a model as `train_tokenizer` does if `spec` is unigram or bpe.

    Raises:
        UserError: there is no such file, or it is no such model; or as `train_tokenizer`.
    """
    if spec in ("unigram", "bpe"):
        return train_tokenizer(
            source, cache_dir=cache_dir, vocabulary=vocabulary, kind=spec, side=side, at_most=at_most
        )
    place = place_of(spec)
    if not exists(place):
        raise UserError(
            f"The tokenizer {spec} does not exist; give a sentencepiece .model file as --data.tokenizer, or unigram or bpe."
        )
    with open_bytes(place) as file:
        return Tokenizer(file.read(), spec)


def _train(source: PairSource, vocabulary: int, kind: ModelKind, side: Side, at_most: bool) -> bytes:
    package, model = sentencepiece(), io.BytesIO()
    package.set_random_generator_seed(0)
    try:
        package.SentencePieceTrainer.train(
            sentence_iterator=_sentences(source, side),
            model_writer=model,
            vocab_size=vocabulary,
            model_type=kind,
            hard_vocab_limit=not (at_most and kind == "unigram"),
            pad_id=PAD,
            unk_id=UNK,
            eos_id=EOS,
            bos_id=-1,
            input_sentence_size=_MOST_SENTENCES,
            shuffle_input_sentence=True,
            num_threads=1,  # the order of sums would depend on threads
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_refusal(str(error), source, vocabulary)) from error
    return model.getvalue()


def _sentences(source: PairSource, side: Side) -> Iterator[str]:
    for pair in source.read():
        yield from (text for text in (pair.source, pair.target)[slice(*_SIDES[side])] if text)


_SIDES = {"both": (0, 2), "source": (0, 1), "target": (1, 2)}


def _refusal(found: str, source: PairSource, vocabulary: int) -> str:
    if largest := _LARGEST.search(found):
        return (
            f"The text of {source.name} does not give {vocabulary:,} pieces: set --data.vocabulary to at most {largest[1]}, or "
            "give more text."
        )
    if smallest := _SMALLEST.search(found):
        return (
            f"The letters of {source.name} need more than {vocabulary:,} pieces: set --data.vocabulary to at least "
            f"{smallest[1]}."
        )
    if "empty()" in found:
        return f"{source.name} holds no text to train a tokenizer on; give pairs with text in them."
    return (
        f"The tokenizer cannot be trained on {source.name} ({found[:200]}); choose another --data.tokenizer or "
        "--data.vocabulary."
    )
