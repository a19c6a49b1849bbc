"""Translations of a trained model, and how good they are: BLEU and chrF by sacrebleu, and whether a difference is chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.data import Dataset
from bilevel.nn.translation.base import END, EncoderDecoder
from bilevel.nn.translation.beam_search import Penalty, beam_search, by_length
from bilevel.types import Params, UserError

_RESAMPLED = 1000
"""Samples of a paired test: sacrebleu's default."""
_AT_ONCE = 128


class Scores(NamedTuple):
    """Measures of a corpus of translations."""

    bleu: float
    """0 to 100."""
    chrf: float
    """0 to 100: the F-score of character n-grams."""


def translator(
    network: EncoderDecoder, *, beam: int, most: int, penalty: Penalty = by_length
) -> Callable[[Params, Dataset], list[list[int]]]:
    """Return what translates all rows of a data set, with one compiled program: (θ, rows) -> pieces without END, a list a row.

    See `beam_search` for the arguments.
    """
    search = jax.jit(lambda params, batch: beam_search(network, params, batch, beam=beam, most=most, penalty=penalty))

    def translate(params: Params, rows: Dataset) -> list[list[int]]:
        size = len(rows)
        # A search goes on until the last of its rows is over: rows of similar length are searched together.
        order = np.argsort(rows.rows(np.arange(size))["source_length"], kind="stable")
        found: list[list[int]] = [[] for _ in range(size)]
        at_once = min(_AT_ONCE, size)
        for start in range(0, size, at_once):
            places = order[np.minimum(np.arange(start, start + at_once), size - 1)]  # the last row again, as padding
            pieces, length, _ = jax.device_get(search(params, rows.rows(places)))
            for place, row, count in zip(places, pieces, length, strict=True):
                found[place] = [int(piece) for piece in row[:count] if piece != END]
        return found

    return translate


def scored(translations: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Scores:
    """Return BLEU and chrF of translations against one reference each.

    Args:
      translations: as text.
      references: as many.
      tokenize: as sacrebleu has it: "13a"; "none" for text that is tokenised already.

    Raises:
      UserError: sacrebleu is not installed.
    """
    bleu, chrf = _metrics(tokenize)
    found = bleu.corpus_score(list(translations), [list(references)])
    return Scores(
        float(found.score),
        float(chrf.corpus_score(list(translations), [list(references)]).score),
    )


def signature(tokenize: str = "13a") -> str:
    """Return sacrebleu's signature of BLEU: references, case, tokenisation, smoothing, version."""
    bleu, _ = _metrics(tokenize)
    bleu.corpus_score([""], [[""]])  # the number of references is known only then
    return str(bleu.get_signature())


def chance_of_difference(
    baseline: Sequence[str], translations: Sequence[str], references: Sequence[str], tokenize: str = "13a"
) -> Mapping[str, float]:
    """Return by `bleu` and `chrf` how probable as large a difference is by chance, by sacrebleu's paired bootstrap test.

    Reference: Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004.
    """
    from sacrebleu.significance import PairedTest

    bleu, chrf = _metrics(tokenize, references)
    systems: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), ("system", list(translations))]
    _, found = PairedTest(systems, {"BLEU": bleu, "chrF": chrf}, None, "bs", _RESAMPLED)()
    results: Any = {name: values[-1] for name, values in found.items()}  # by the names BLEU and chrF2
    return {name[:4].lower(): float(r.p_value) for name, r in results.items() if name != "System"}


def _metrics(tokenize: str, references: Sequence[str] | None = None) -> tuple[Any, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise UserError("BLEU needs sacrebleu: run `pip install 'bilevel[translation]'`.") from error
    given = None if references is None else [list(references)]
    return BLEU(tokenize=tokenize, references=given), CHRF(references=given)
