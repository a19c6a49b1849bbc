"""How alike languages are by their most frequent letters in a row: the similarity of TCS.

    sim(i, S) = |V_k(i) ∩ V_k(S)| / k,    V_k(i) the k most frequent n-grams of characters, n ≤ 4, of language i's text.

Reference: Wang and Neubig, "Target conditioned sampling: optimizing data selection for multilingual neural machine translation",
ACL 2019. N-grams lie inside of words (between white space); of two as frequent, the first by its code points counts as the more
frequent one. Both are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.notes import note
from bilevel.types import UserError


class Ngrams(NamedTuple):
    """The n-grams of a text, the most frequent first."""

    texts: list[str]
    counts: NDArray[np.int64]


def similarities(
    texts: Mapping[str, Iterable[str]], specific: str, *, most: int = 10_000, longest: int = 4
) -> dict[str, float]:
    """Compute sim(i, S) for each language i.

    Args:
        texts: the sentences of each language, by its name.
        specific: S.
        most: k. Where a language has fewer n-grams, all are compared by as many as it has, and a note says so.
        longest: the largest n.

    Raises:
        UserError: S is none of the languages, or one has no text.
    """
    if specific not in texts:
        raise UserError(f"There is no text of {specific!r}, but of {', '.join(texts)}: choose one of these.")
    found = {name: frequent_ngrams(sentences, most=most, longest=longest).texts for name, sentences in texts.items()}
    shortest = min(found, key=lambda name: len(found[name]))
    count = len(found[shortest])
    if not count:
        raise UserError(f"The text of {shortest!r} is empty: give sentences of it.")
    if count < most:
        note(
            f"languages are compared by their {count:,} most frequent n-grams instead of {most:,}: {shortest} has no more."
        )
    sets = {name: set(ngrams[:count]) for name, ngrams in found.items()}
    return {name: len(ngrams & sets[specific]) / count for name, ngrams in sets.items()}


def frequent_ngrams(sentences: Iterable[str], *, most: int = 10_000, longest: int = 4) -> Ngrams:
    """Find the most frequent n-grams of characters inside of words, n from 1 to `longest`.

    Raises:
        UserError: a number is below 1.
    """
    if most < 1 or longest < 1:
        raise UserError(f"most={most} and longest={longest} must both be at least 1.")
    words = "\n".join("\n".join(sentence.split()) for sentence in sentences)
    letters = np.frombuffer(words.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = letters != ord("\n")
    alphabet, codes = np.unique(letters, return_inverse=True)
    grams: list[str] = []
    counts: list[NDArray[np.int64]] = []
    numbers = codes.astype(np.int64)  # of the n-gram that begins at each letter
    whole = inside
    for n in range(1, longest + 1):
        if n > 1:
            whole = whole[:-1] & inside[n - 1 :]
            numbers = np.unique(numbers[:-1] * len(alphabet) + codes[n - 1 :], return_inverse=True)[1]
        _, first, each = np.unique(numbers[whole], return_index=True, return_counts=True)
        # More than these cannot be among the most frequent of all lengths, but for those that are as frequent as the last.
        enough = each >= (np.partition(each, -most)[-most] if len(each) > most else 0)
        begins = np.flatnonzero(whole)[first[enough]]
        grams += [words[i : i + n] for i in begins.tolist()]
        counts.append(each[enough])
    joined = np.concatenate(counts)
    order = sorted(range(len(grams)), key=lambda i: (-joined[i], grams[i]))[:most]
    return Ngrams([grams[i] for i in order], joined[order])
