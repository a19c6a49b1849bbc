"""Which documents of a corpus are kept, and what their scores mean there: quantiles and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.files import appearing
from bilevel.offline.documents import drawn_ranks, highest_documents
from bilevel.types import UserError

KEEP = ("keep_fraction", "keep_count", "keep_quantile")
"""Fields of which one says how many documents are kept."""
_LIMITS = ("max_copies", "max_per_group")
_SCORES, _EXCESS, _FOUND = "scores.npy", "excess.npy", "choice.json"
_MUST: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "keep_fraction": ("lie in (0, 1]", lambda x: 0 < x <= 1),
    "keep_count": ("be at least 1", lambda x: x >= 1),
    "keep_quantile": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "max_copies": ("be at least 1", lambda x: x >= 1),
    "max_per_group": ("be at least 1", lambda x: x >= 1),
    "rule": ("be top or gumbel", lambda x: x in ("top", "gumbel")),
    "temperature": ("be greater than 0", lambda x: x > 0),
    "seed": ("be at least 0", lambda x: x >= 0),
}


@dataclass(frozen=True)
class Rule:
    """How documents are chosen by their scores; without one of the first three fields, all are kept.

    Raises:
        UserError: a value is out of range.
    """

    keep_fraction: float | None = None
    """Share of the documents, rounded to a whole number of at least 1."""
    keep_count: int | None = None
    """Number of documents."""
    keep_quantile: float | None = None
    """Least quantile: the share of the documents of the corpus with a lower score."""
    max_copies: int | None = None
    """Most documents of the same text that can be kept, the first ones of the corpus; None: any number."""
    max_per_group: int | None = None
    """Most documents of the same group that can be kept, those of the highest ranks; None: any number."""
    rule: Literal["top", "gumbel"] = "top"
    """Those with the highest scores; or a draw without replacement, in proportion to exp(score / temperature)."""
    temperature: float = 1.0
    seed: int = 0
    """Decides the draw, together with the positions of a document's part and of the document in it."""

    def __post_init__(self) -> None:
        for name, (must, right) in _MUST.items():
            value = getattr(self, name)
            if value is not None and not right(value):
                raise UserError(f"{name} {value} must {must}.")

    def ranks(self, scores: NDArray[np.float32], part: int) -> NDArray[np.float32]:
        """Return what the threshold is of, float32 `[n]`: the scores of a part, or these with noise (`drawn_ranks`)."""
        return drawn_ranks(scores, self.temperature, (self.seed, part)) if self.rule == "gumbel" else scores


@dataclass(frozen=True)
class Choice:
    """A rule applied to all scores of a corpus: what is needed to judge each part by itself."""

    rule: Rule
    scores: NDArray[np.float32]
    """float32 `[n]`: of all documents, in order."""
    threshold: float
    """The lowest kept rank."""
    ties: tuple[int, ...]
    """How many documents of each part are kept of those whose rank is the threshold: its first ones."""
    documents: tuple[int, ...]
    """How many scored documents each part has."""
    kept: tuple[int, ...]
    """How many documents of each part are kept."""
    highest: float
    """Of the kept scores."""
    mean: float
    """Of exp((score − highest) / temperature) over the kept documents."""
    effective_sample_size: float
    """Of the weights of the kept documents."""
    excess: NDArray[np.bool_] | None = None
    """bool `[n]`: of the documents of all parts, in order, those that the limits on copies and groups
    leave out; None: there is no limit."""

    def kept_of(self, scores: NDArray[np.float32], part: int) -> NDArray[np.bool_]:
        """Return which documents of a part are kept, bool `[n]`, given its scores, float32 `[n]`."""
        ranks = self.rule.ranks(scores, part)
        if self.excess is not None:
            first = sum(self.documents[:part])
            ranks = np.where(self.excess[first : first + len(ranks)], -np.inf, ranks)
        kept = ranks > self.threshold
        kept[np.flatnonzero(ranks == self.threshold)[: self.ties[part]]] = True
        return kept

    def quantiles(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the share of the scored documents of the corpus with a lower score, float64 `[n]`, from 0 to below 1."""
        return np.searchsorted(self.scores, scores) / len(self.scores)

    def weights(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return exp(score / temperature), float32 `[n]`, divided by its mean over the kept documents."""
        return (_unscaled(scores, self.highest, self.rule) / self.mean).astype(np.float32)

    def scores_at(self, quantiles: Sequence[float]) -> dict[str, float]:
        """Return the scores at some quantiles, by these."""
        values = np.quantile(self.scores, quantiles)
        return {str(q): float(value) for q, value in zip(quantiles, values, strict=True)}

    def save(self, folder: Path) -> None:
        """Write the choice to a folder, which must exist, for processes that judge one part each."""
        with appearing(folder / _SCORES) as path, path.open("wb") as file:
            np.save(file, self.scores)
        if self.excess is not None:
            with appearing(folder / _EXCESS) as path, path.open("wb") as file:
                np.save(file, self.excess)
        found = {name: value for name, value in vars(self).items() if name not in ("rule", "scores", "excess")}
        with appearing(folder / _FOUND) as path:
            path.write_text(json.dumps({"rule": asdict(self.rule), **found}), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Choice:
        """Read what `save` wrote; the scores stay on disk, memory-mapped.

        Raises:
            UserError: the folder holds no choice, or a damaged one.
        """
        try:
            found: dict[str, Any] = json.loads((folder / _FOUND).read_text(encoding="utf-8"))
            found["rule"], found["scores"] = Rule(**found["rule"]), np.load(folder / _SCORES, mmap_mode="r")
            if _limited(found["rule"]):
                found["excess"] = np.load(folder / _EXCESS, mmap_mode="r")
            lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
            return cls(**{**found, **lists})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder} holds no choice of documents ({error}): choose again.") from error


def choose(
    scores: Sequence[NDArray[np.float32]],
    rule: Rule,
    corpus: str,
    shown: Callable[[str], str] = str,
    texts: Sequence[NDArray[np.int64]] | None = None,
    groups: Sequence[NDArray[np.int64]] | None = None,
) -> Choice:
    """Find which documents of a corpus are kept, exactly: of equal ranks, the first in the corpus.

    Args:
        scores: of the documents of each part, in memory.
        rule: how many, and which.
        corpus: its name, for messages.
        shown: the name of a field of the rule -> what the user calls it, for messages.
        texts: `digests` of the documents, with `max_copies`.
        groups: likewise, of what names their groups, with `max_per_group`.

    Raises:
        UserError: the corpus has no text, or fewer documents than are to be kept.
    """
    whole = np.sort(np.concatenate(scores)) if len(scores) else np.zeros(0, np.float32)
    if not len(whole):
        raise UserError(f"{corpus} holds no text: give files with text in them.")
    ranks = [rule.ranks(own, part) for part, own in enumerate(scores)]
    excess = None
    if _limited(rule):
        excess = _excess(
            np.concatenate(ranks), rule, *(None if x is None else np.concatenate(x) for x in (texts, groups))
        )
        parts = np.split(excess, np.cumsum([len(x) for x in ranks])[:-1])
        ranks = [np.where(out, np.float32(-np.inf), own) for out, own in zip(parts, ranks, strict=True)]
    threshold, kept = highest_documents(ranks, _count(whole, scores, excess, rule, corpus, shown))
    chosen = np.concatenate([own[which] for own, which in zip(scores, kept, strict=True)])
    unscaled = _unscaled(chosen, float(chosen.max()), rule)
    return Choice(
        rule=rule, scores=whole, threshold=threshold,
        ties=tuple(int((own[which] == threshold).sum()) for own, which in zip(ranks, kept, strict=True)),
        documents=tuple(map(len, scores)), kept=tuple(int(which.sum()) for which in kept),
        highest=float(chosen.max()), mean=float(unscaled.mean()),
        effective_sample_size=float(unscaled.sum() ** 2 / np.square(unscaled).sum()), excess=excess,
    )  # fmt: skip


def _limited(rule: Rule) -> bool:
    return any(getattr(rule, name) is not None for name in _LIMITS)


def _excess(
    ranks: NDArray[np.float32], rule: Rule, texts: NDArray[np.int64] | None, groups: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Which documents have so many of the same text before them, or of the same group above them, bool `[n]`."""
    out = np.zeros(len(ranks), np.bool_)
    if rule.max_copies is not None:
        assert texts is not None
        out = _behind(texts, np.argsort(texts, kind="stable"), rule.max_copies)
    if rule.max_per_group is not None:
        assert groups is not None
        left = np.flatnonzero(~out)
        own = groups[left]
        out[left] = _behind(own, np.lexsort((-ranks[left], own)), rule.max_per_group)
    return out


def _behind(kinds: NDArray[np.int64], order: NDArray[np.intp], most: int) -> NDArray[np.bool_]:
    """Which of those of a kind come behind the first `most` in an order that has equal kinds together, bool `[n]`."""
    grouped = kinds[order]
    found = np.zeros(len(kinds), np.bool_)
    found[order[most:]] = grouped[most:] == grouped[: len(grouped) - most]
    return found


def _count(
    whole: NDArray[np.float32], scores: Sequence[NDArray[np.float32]], excess: NDArray[np.bool_] | None, rule: Rule,
    corpus: str, shown: Callable[[str], str],
) -> int:  # fmt: skip
    """How many documents are kept of those with some scores, `whole` in order, without those in excess."""
    left = len(whole) if excess is None else int((~excess).sum())
    if rule.keep_quantile is not None:
        own = whole if excess is None else np.concatenate(scores)[~excess]
        quantiles = np.searchsorted(whole, own) / len(whole)
        count = int((quantiles >= rule.keep_quantile).sum())
        if not count:
            raise UserError(
                f"{shown('keep_quantile')} {rule.keep_quantile} is more than the highest quantile of {corpus}, "
                f"{quantiles.max():g}, which several documents share: give less, or {shown('keep_count')}."
            )
        return count
    if rule.keep_fraction is not None:
        return min(left, max(1, round(rule.keep_fraction * len(whole))))
    count = rule.keep_count or left
    if count > left:
        limits = [f"{shown(name)} {value}" for name in _LIMITS if (value := getattr(rule, name)) is not None]
        kind = f"documents{' with ' if limits else ''}{' and '.join(limits)}"
        raise UserError(
            f"{shown('keep_count')} {count} is more than the {left} {kind} in {corpus}: give at most {left} "
            "(what is scored is used again)."
        )
    return count


def _unscaled(scores: NDArray[np.float32], highest: float, rule: Rule) -> NDArray[np.float64]:
    return np.exp((scores.astype(np.float64) - highest) / rule.temperature)
