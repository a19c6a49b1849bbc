"""Which documents of a corpus are kept, and what their scores mean there: quantiles and weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilevel.offline.documents import drawn_ranks, highest_documents
from bilevel.tools.select.config import Config
from bilevel.types import UserError

Scores = Sequence[NDArray[np.float32]]


class Choice:
    """What every process finds, given the scores by part, which are in memory for the whole corpus.

    Raises:
      UserError: if the corpus has no text, or fewer documents than are to be kept.
    """

    def __init__(self, config: Config, scores: Scores):
        self._sorted = np.sort(np.concatenate(scores)) if scores else np.zeros(0, np.float32)
        self.scores, self._temperature = scores, config.temperature
        if not len(self._sorted):
            raise UserError(f"{config.corpus} holds no text: give files with text in them.")
        count = self._count(config)
        ranks = scores
        if config.rule == "gumbel":
            ranks = [drawn_ranks(own, config.temperature, (config.seed, part)) for part, own in enumerate(scores)]
        self.threshold, self.kept = highest_documents(ranks, count)
        chosen = np.concatenate([own[kept] for own, kept in zip(scores, self.kept, strict=True)])
        self._highest = float(chosen.max())
        unscaled = self._unscaled(chosen)
        self._mean = float(unscaled.mean())
        self.effective_sample_size = float(unscaled.sum() ** 2 / np.square(unscaled).sum())

    def _count(self, config: Config) -> int:
        whole = len(self._sorted)
        if config.keep_quantile is not None:
            count = int((self.quantiles(self._sorted) >= config.keep_quantile).sum())
            if not count:
                highest = self.quantiles(self._sorted[-1:])[0]
                raise UserError(
                    f"--keep-quantile {config.keep_quantile} is more than the highest quantile of {config.corpus}, {highest:g}, "
                    "which several documents share: give less, or --keep-count."
                )
            return count
        share = 1.0 if config.keep_fraction is None else config.keep_fraction
        count = config.keep_count or max(1, round(share * whole))
        if count > whole:
            raise UserError(
                f"--keep-count {count} is more than the {whole} documents in {config.corpus}: give at most {whole} (what "
                "is scored is used again)."
            )
        return count

    def quantiles(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the share of the scored documents of the corpus with a lower score, float64 `[n]`, from 0 to below 1."""
        return np.searchsorted(self._sorted, scores) / len(self._sorted)

    def weights(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return exp(score / temperature), float32 `[n]`, divided by its mean over the kept documents."""
        return (self._unscaled(scores) / self._mean).astype(np.float32)

    def scores_at(self, quantiles: Sequence[float]) -> dict[str, float]:
        """Return the scores at some quantiles, by these."""
        values = np.quantile(self._sorted, quantiles)
        return {str(q): float(value) for q, value in zip(quantiles, values, strict=True)}

    def _unscaled(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.exp((scores.astype(np.float64) - self._highest) / self._temperature)
