"""Packed pairs of several source languages with one target language: a vocabulary of each, merged; rows known by their target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.joined import JoinedData
from bilevel.data.pairs.by_target import PairsByTarget, pairs_by_target
from bilevel.data.pairs.packed_pairs import PackedPairs, pack_pairs
from bilevel.data.pairs.pair_sources import PairParts
from bilevel.data.pairs.stream import PairSource, joined_pairs, parts_of_pairs
from bilevel.data.pairs.tokenizer import MergedVocabulary, PairTokenizer, Tokenizer, open_tokenizer
from bilevel.types import UserError


class LanguageRows(JoinedData):
    """Training pairs of several source languages, one language after the other.

    Args:
        parts: the packed pairs by language.
    """

    def __init__(self, parts: Mapping[str, PackedPairs]):
        super().__init__(parts)
        self.pairs = dict(parts)
        """The packed pairs by language."""
        self.table: PairsByTarget = pairs_by_target(parts)

    @property
    def languages(self) -> NDArray[np.int32]:
        """int32 `[N]`: the language of each row, by its place in `parts`."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), [len(part) for part in self.parts.values()])

    def sentences(self, language: str) -> list[str]:
        """Return the source sentences of a language."""
        part = self.pairs[language]
        return [part.text(i)[0] for i in range(len(part))]

    def text(self, row: int) -> tuple[str, str]:
        """Return the source and the target sentence of a row."""
        which = int(np.searchsorted(self.starts, row, side="right")) - 1
        return list(self.pairs.values())[which].text(row - int(self.starts[which]))


class LanguageData(NamedTuple):
    """The pairs of several source languages, packed."""

    train: LanguageRows
    specific: PackedPairs
    """Half of the valid pairs of the specific language, by a hash of the source sentence: weights are learned on these."""
    valid: PackedPairs
    """The other half: choices are made on these."""
    test: Mapping[str, PackedPairs]
    source: PairTokenizer
    """Of the specific language, its pieces numbered as in the vocabulary of all."""
    target: PairTokenizer


def pack_languages(
    generic: Mapping[str, PairSource],
    specific: str,
    parts: PairParts,
    *,
    shared: bool,
    tokenizer: str = "unigram",
    vocabulary: int = 2000,
    cache_dir: str | Path,
    **packing: Any,
) -> LanguageData:
    """Train a vocabulary for each language, merge those of the sources by their pieces, and pack.

    Args:
        generic: training pairs by source language, all into one target language.
        specific: the source language that the model is for.
        parts: pairs of that language; of these valid and test are taken, its training pairs are among the generic ones.
        shared: whether the target language is in the merged vocabulary too, for models with one embedding for both sides; else it
            has its own.
        tokenizer: unigram or bpe.
        vocabulary: the most pieces of each language.
        cache_dir: made if it does not exist.
        packing: as `pack_pairs` takes it.

    Raises:
        UserError: the specific language is none of these; or as `open_tokenizer` and `pack_pairs`.

    Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, section 4.1 (a vocabulary of 8,000
    pieces for each language).
    """
    if specific not in generic:
        raise UserError(
            f'--data.specific-language is "{specific}", which is none of --data.source-language {",".join(generic)}: choose one.'
        )
    options: dict[str, Any] = {"cache_dir": cache_dir, "vocabulary": vocabulary, "at_most": True}
    of_source: dict[str, Tokenizer] = {
        name: open_tokenizer(tokenizer, source, side="source", **options) for name, source in generic.items()
    }
    everything = joined_pairs(", ".join(generic), list(generic.values()))
    target = open_tokenizer(tokenizer, everything, side="target", **options)
    language = everything.languages.target
    merged = MergedVocabulary({**of_source, language: target} if shared else of_source)
    to = merged.of(language) if shared else target

    def packed(source: PairSource, name: str) -> PackedPairs:
        return pack_pairs(source, merged.of(name), target_tokenizer=to, cache_dir=cache_dir, **packing)

    halves = parts_of_pairs(parts.valid, {"specific": 0.5, "valid": 0.5})
    return LanguageData(
        LanguageRows({name: packed(source, name) for name, source in generic.items()}),
        packed(halves["specific"], specific),
        packed(halves["valid"], specific),
        {name: packed(part, specific) for name, part in parts.test.items()},
        merged.of(specific),
        to,
    )
