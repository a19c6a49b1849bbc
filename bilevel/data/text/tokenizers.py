"""Tokenizers of text that the user brings: `tokenizer.json` files and sentencepiece models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest
from bilevel.data.opening import Place, exists, is_folder, name_of, open_bytes, place_of
from bilevel.data.sentencepieces import processor_of
from bilevel.types import UserError

BYTES = "bytes"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""In the folder of a model."""
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Tokens that stand behind a document, if tokenizer_config.json names none."""


class Tokens(NamedTuple):
    """The tokens of some texts, one text after the other."""

    ids: NDArray[Any]
    """uint16 or uint32 `[n]`."""
    starts: NDArray[np.int64]
    """int64 `[n]`: the byte of its text at which each token begins; 0 for the first one of a text, and never falling in one."""
    counts: NDArray[np.int64]
    """int64 `[texts]`: tokens of each text."""


class TextTokenizer(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def size(self) -> int:
        """V: all tokens are below."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the tokenizer."""
        ...

    @property
    def end(self) -> int | None:
        """The token that stands behind a document; None: there is none."""
        ...

    @property
    def unknown(self) -> int | None:
        """The token of what the tokenizer does not know; None: it knows everything."""
        ...

    def encode(self, texts: Sequence[bytes], /) -> Tokens:
        """Cut texts (UTF-8) into tokens, none of them special."""
        ...

    def decode(self, row: NDArray[Any], /) -> str:
        """Return the text of some tokens."""
        ...


def open_text_tokenizer(spec: str) -> TextTokenizer | None:
    """Open a tokenizer.

    Args:
        spec: "bytes"; a `tokenizer.json` of the library tokenizers, a sentencepiece `.model` file, or a folder with one of them
            under the names that models have them by.

    Returns:
        The tokenizer; None for bytes.

    Raises:
        UserError: there is no such file, it is of another kind, or the package that reads it is not installed.
    """
    if spec == BYTES:
        return None
    place = _file(spec)
    with open_bytes(place, decompress=False) as file:
        content = file.read()
    if content.lstrip()[:1] == b"{":
        return _Json(content, spec, _named_end(place))
    return _SentencePieces(content, spec)


def token_type(tokenizer: TextTokenizer | None) -> type[np.uint8] | type[np.uint16] | type[np.uint32]:
    """Return the type of packed tokens."""
    if tokenizer is None:
        return np.uint8
    return np.uint16 if tokenizer.size <= 1 << 16 else np.uint32


def _file(spec: str) -> Place:
    place = place_of(spec)
    if is_folder(place):
        inside = [f"{spec.rstrip('/')}/{name}" for name in TOKENIZERS]
        found = next((place_of(path) for path in inside if exists(place_of(path))), None)
        if found is None:
            raise UserError(f"The folder {spec} holds no {' or '.join(TOKENIZERS)}; name the file as --data.tokenizer.")
        return found
    if not exists(place):
        raise UserError(
            f"The tokenizer {spec} does not exist; give a tokenizer.json or a sentencepiece .model file as --data.tokenizer, or "
            "bytes."
        )
    return place


def _named_end(place: Place) -> str | None:
    """The token that tokenizer_config.json, beside a tokenizer.json, names for the end of a document."""
    beside = str(place).removesuffix(name_of(place)) + "tokenizer_config.json"
    if not exists(place_of(beside)):
        return None
    with open_bytes(place_of(beside)) as file:
        try:
            found = json.loads(file.read()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{beside} is not the JSON of a tokenizer's settings ({error}).") from error
    return found.get("content") if isinstance(found, dict) else found


class _Json:
    """A `tokenizer.json`."""

    def __init__(self, content: bytes, name: str, end: str | None):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{name} needs tokenizers: run `pip install 'bilevel[tokenizers]'`.") from error
        try:
            tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain exceptions
            raise UserError(
                f"{name} is not a tokenizer.json ({str(error)[:100]}); give one, or a .model file, as --data.tokenizer."
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        known = [tokenizer.token_to_id(token) for token in ([end] if end else _ENDS)]
        self.name = name
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.end: int | None = next((token for token in known if token is not None), None)
        unknown = getattr(tokenizer.model, "unk_token", None)
        self.unknown: int | None = None if unknown is None else tokenizer.token_to_id(unknown)
        self.fingerprint = digest([content, str(self.end)])
        self._tokenizer, self._type = tokenizer, token_type(self)

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        """Cut texts into tokens."""
        found = self._tokenizer.encode_batch([text.decode() for text in texts], add_special_tokens=False)
        starts = [_byte_starts(text, [start for start, _ in e.offsets]) for text, e in zip(texts, found, strict=True)]
        return _tokens(texts, [e.ids for e in found], starts, self._type)

    def decode(self, row: NDArray[Any]) -> str:
        """Return the text of some tokens."""
        return self._tokenizer.decode(row.tolist(), skip_special_tokens=False)


class _SentencePieces:
    """A sentencepiece model."""

    def __init__(self, model: bytes, name: str):
        self._processor = processor_of(model, name, "a tokenizer.json", "tokenizers")
        self.name = name
        self.size: int = self._processor.get_piece_size()
        self.fingerprint = digest([model])
        self.end: int | None = _id(self._processor.eos_id())
        self.unknown: int | None = _id(self._processor.unk_id())
        self._type = token_type(self)

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        """Cut texts into tokens."""
        strings = [text.decode() for text in texts]
        found = self._processor.encode(strings, return_type="offset_mapping", return_bytes=True)
        starts = [np.array([start for start, _ in e["offsets"]], np.int64) for e in found]
        return _tokens(texts, [e["ids"] for e in found], starts, self._type)

    def decode(self, row: NDArray[Any]) -> str:
        """Return the text of some tokens."""
        return self._processor.decode(row.tolist())


def _id(number: int) -> int | None:
    return number if number >= 0 else None


def _byte_starts(text: bytes, characters: list[int]) -> NDArray[np.int64]:
    """Turn positions in characters into positions in bytes."""
    found = np.array(characters, np.int64)
    if text.isascii():
        return found
    # All bytes but the continuing ones begin a character.
    begins = np.flatnonzero((np.frombuffer(text, np.uint8) & 0xC0) != 0x80)
    return np.append(begins, len(text))[found]


def _tokens(
    texts: Sequence[bytes], ids: Sequence[list[int]], starts: Sequence[NDArray[np.int64]], dtype: Any
) -> Tokens:
    for text, own in zip(texts, starts, strict=True):
        own[:1] = 0
        np.maximum.accumulate(np.minimum(own, max(len(text) - 1, 0)), out=own)
    counts = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter((token for row in ids for token in row), dtype, int(counts.sum()))
    return Tokens(flat, np.concatenate([np.zeros(0, np.int64), *starts]), counts)
