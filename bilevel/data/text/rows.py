"""Documents cut into rows, a block of documents at a time and with no Python for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bilevel.data.loading.arrays import NumpyBatch
from bilevel.data.text.tokenizers import TextTokenizer, Tokens

SHORTEST_TAIL = 16
"""A last window shorter than this (and than the row length) is dropped, unless it is its document's only
one."""
_BLOCK_BYTES = 1 << 20
_BLOCK_DOCUMENTS = 1 << 16


class Rows(NamedTuple):
    """Rows cut from a list of texts, in their order."""

    tokens: NDArray[Any]
    """uint8 `[n, T]` of bytes, uint16 or uint32 of a tokenizer; zero beyond `length`."""
    length: NDArray[np.int32]
    """int32 `[n]`: the real tokens of each row, 1 to T."""
    owner: NDArray[np.int64]
    """int64 `[n]`: the position of each row's text in the list."""
    given: NDArray[np.int32]
    """int32 `[n]`: the first tokens of each row that are of a prompt, 0 to `length`."""
    size: NDArray[np.int32]
    """int32 `[n]`: the bytes of text of each row that are not of a prompt."""


class DocumentRows(NamedTuple):
    """Rows that documents were cut into, in order."""

    batch: NumpyBatch
    """As the weighting network takes them."""
    owner: NDArray[np.integer[Any]]
    """`[b]`: the position of each row's document."""
    size: NDArray[np.integer[Any]]
    """`[b]`: the bytes of text in each row."""


Pack: TypeAlias = Callable[[list[bytes], int], Iterator[DocumentRows]]
"""(documents in UTF-8, most rows) -> their rows, in batches of that size, the last one excepted; none for `b""`."""


class WithText(Protocol):
    """A document of ours, or of another library."""

    @property
    def text(self) -> Sized:
        """What its size is of."""
        ...


D = TypeVar("D", bound=WithText)


def document_blocks(documents: Iterable[D], block_bytes: int = _BLOCK_BYTES) -> Iterator[list[D]]:
    """Group documents into lists of at least `block_bytes` bytes (the last one excepted), or of 65,536 documents."""
    block: list[D] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= block_bytes or len(block) >= _BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut_rows(
    texts: list[bytes],
    length: int,
    most_rows: int | None = None,
    *,
    tokenizer: TextTokenizer | None = None,
    prompts: Sequence[int] | None = None,
) -> Iterator[Rows]:
    """Cut texts into rows: the consecutive windows of `length` bytes, or tokens, of each.

    A last window shorter than `min(16, length)` is dropped unless it is its text's only one; an empty text gives no row.

    Args:
        texts: the texts.
        length: T, the bytes or tokens of a row.
        most_rows: rows in one piece; by default as many as fill 1 MiB, so that memory stays bounded also for one huge
            text.
        tokenizer: what cuts the texts into tokens; None: bytes.
        prompts: the bytes at the beginning of each text that are its prompt; none by default. A token is of the prompt or of
            the answer, never of both.

    Yields:
        The rows of all texts, in pieces of `most_rows` rows, the last one excepted.
    """
    tokens = tokens_of(texts, tokenizer, prompts)
    windows = _windows(tokens.counts, length)
    given, size = np.zeros_like(windows.size), windows.size
    if tokenizer is not None or prompts is not None:
        given, size = _predicted(tokens, windows, texts, prompts)
    flat = np.concatenate([tokens.ids, np.zeros(length, tokens.ids.dtype)])
    view, positions = sliding_window_view(flat, length), np.arange(length)
    chunk = most_rows or max(1, _BLOCK_BYTES // length)
    for first in range(0, len(windows.owner), chunk):
        part = slice(first, first + chunk)
        found, count = view[windows.start[part]], windows.size[part]
        found[positions >= count[:, None]] = 0
        owner, *others = (x[part] for x in (windows.owner, given, size))
        yield Rows(found, count.astype(np.int32), owner, *(x.astype(np.int32) for x in others))


def tokens_of(
    texts: list[bytes],
    tokenizer: TextTokenizer | None,
    prompts: Sequence[int] | None = None,
    *,
    with_starts: bool = False,
) -> Tokens:
    """Return the tokens of texts; those of a prompt end where the prompt ends.

    Bytes without prompts have no starts, if they are not asked for `with_starts`.
    """
    if tokenizer is None:
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        starts = np.zeros(0, np.int64)
        if with_starts or prompts is not None:
            starts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Tokens(np.frombuffer(b"".join(texts), np.uint8), starts, counts)
    if prompts is None or not any(prompts):
        return tokenizer.encode(texts)
    parts = [part for text, prompt in zip(texts, prompts, strict=True) for part in (text[:prompt], text[prompt:])]
    ids, starts, counts = tokenizer.encode(parts)
    offsets = np.stack([np.zeros(len(texts), np.int64), np.asarray(prompts, np.int64)], axis=1).ravel()
    return Tokens(ids, starts + np.repeat(offsets, counts), counts.reshape(-1, 2).sum(axis=1))


class _Windows(NamedTuple):
    """Windows of texts, in order, each int64 `[n]`."""

    owner: NDArray[np.int64]
    """The position of the window's text in the list."""
    start: NDArray[np.int64]
    """Its first token, among those of all texts."""
    size: NDArray[np.int64]
    """Its tokens, 1 to the length."""


def _windows(counts: NDArray[np.int64], length: int) -> _Windows:
    """Find the windows of texts of `counts` tokens, int64 `[texts]`."""
    full, rest = np.divmod(counts, length)
    keep_rest = (rest >= min(SHORTEST_TAIL, length)) | ((full == 0) & (rest > 0))
    windows = full + keep_rest
    owner = np.repeat(np.arange(len(counts)), windows)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(windows) - windows, windows)  # which window of its text
    start = np.repeat(np.cumsum(counts) - counts, windows) + place * length
    return _Windows(owner, start, np.minimum(counts[owner] - place * length, length))


def _predicted(
    tokens: Tokens, windows: _Windows, texts: list[bytes], prompts: Sequence[int] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens of each window that are of a prompt, and the bytes of what is not, int64 `[n]`.

    A window ends, in bytes, where the token behind it begins, so that all bytes of a text are in its windows.
    """
    owner, start, count = windows
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    last = np.cumsum(tokens.counts)[owner] == start + count
    end = np.where(last, sizes[owner], np.append(tokens.starts, 0)[start + count])
    begin = tokens.starts[start]
    if prompts is None:
        return np.zeros_like(count), end - begin
    prompt = np.asarray(prompts, np.int64)
    before = np.concatenate([[0], np.cumsum(tokens.starts < np.repeat(prompt, tokens.counts))])
    return before[start + count] - before[start], end - np.clip(prompt[owner], begin, end)
