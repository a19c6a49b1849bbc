"""Methods that draw a source language for each target sentence: multilingual DDS and its baselines (Wang et al., section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import NonNegativeInt, PositiveFloat

from bilevel import samplers
from bilevel.data import PairsByTarget
from bilevel.offline.language_similarity import similarities
from bilevel.study.context import Context
from bilevel.study.sampled import sampled_plan
from bilevel.study.spec import Plan, Spec, probed
from bilevel.study.task import SourceLanguages, Splits
from bilevel.training.settings import Count
from bilevel.types import UserError


@dataclass(frozen=True)
class Rounds:
    """Uniform over the languages of each target; over all pairs (uniform_pairs): every pair is a target of its own."""

    targets_per_round: NonNegativeInt = 0
    """K: targets in a round, each with one language drawn; 0: a tenth of all, at most 20,000 (the authors' number)."""

    def targets(self, table: PairsByTarget) -> int:
        """Return K, at most all targets."""
        count = len(table.rows)
        return min(self.targets_per_round or max(1, min(20_000, count // 10)), count)


@dataclass(frozen=True)
class Related(Rounds):
    """Uniform over the targets of the specific language and its kin alone."""

    kin: str | None = None
    """Its kin, comma-separated; none given: the language that is most similar by TCS."""


@dataclass(frozen=True)
class Tcs(Rounds):
    """TCS: languages in proportion to exp(sim/τ), sim the overlap of frequent n-grams with the specific language."""

    similarity_temperature: PositiveFloat = 0.01
    """τ."""
    ngrams: Count = 10_000
    """k: n-grams that are compared."""


@dataclass(frozen=True)
class MultilingualDds(Rounds):
    """Multilingual DDS: a scorer of languages, rewarded by how well their gradients fit that of the specific language."""

    scorer_steps: Count = 10
    """E: updates of the scorer in a round."""
    scorer_batch_size: Count = 160
    """B: targets in each."""
    scorer_learning_rate: PositiveFloat = 1e-4
    """Its learning rate (Adam)."""
    scorer_units: Count = 64
    """Units of its hidden layer."""
    temperature: PositiveFloat = 1.0
    """Of its softmax."""
    reward: Literal["cosine", "dot"] = "cosine"
    """How gradients are compared."""
    reward_scale: PositiveFloat = 0.001
    """Factor of rewards; Adam divides it out, but for its ε."""
    specific_rows: Literal["dev", "train"] = "dev"
    """Whose gradient languages are compared with: that of all specific rows, fresh each round, or the running one of the specific
    language's training rows."""
    through_optimizer: bool = False
    """Pull that gradient back through the optimizer's update; else the raw gradient."""
    estimator: Literal["sum", "positive_sum", "policy_gradient"] = "positive_sum"
    """positive_sum: p(i|y) tends to be proportional to the rewards, where negative ones count as 0; sum: the paper's line 5, by
    which it goes to 0 where they are negative; policy_gradient: it goes to the best."""
    gradient_decay: float = 0.5
    """α₁ of the running gradients."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which they are kept, one for each language."""
    gradient_blocks: NonNegativeInt = 0
    """Keep and compare those of the last blocks alone; 0: of all parameters."""


@dataclass(frozen=True)
class TcsDds(MultilingualDds, Tcs):
    """TCS + DDS: multilingual DDS whose scorer begins with the chances of TCS."""

    scorer_steps: Count = 100


def _uniform(s: Rounds, context: Context) -> Plan:
    return _fixed(s, context, _languages(context).table)


def _pairs(s: Rounds, context: Context) -> Plan:
    return _fixed(s, context, _languages(context).table.apart())


def _related(s: Related, context: Context) -> Plan:
    found = _languages(context)
    if s.kin is None:
        similar = _similarities(found, Tcs().ngrams)
        kin = [max((name for name in similar if name != found.specific), key=lambda name: similar[name])]
    else:
        kin = [name.strip() for name in s.kin.split(",")]
    if unknown := [name for name in kin if name not in found.table.languages or name == found.specific]:
        raise UserError(
            f"--{context.flag}.kin {s.kin} names {', '.join(unknown)}: choose among "
            f"{', '.join(name for name in found.table.languages if name != found.specific)}."
        )
    return _fixed(
        s,
        context,
        found.table.only([found.specific, *kin]),
        about={"trained_on": f"{found.specific}, {', '.join(kin)}"},
    )


def _tcs(s: Tcs, context: Context) -> Plan:
    found = _languages(context)
    return _fixed(s, context, found.table, _logits(s, found))


def _fixed(s: Rounds, context: Context, table: PairsByTarget, logits: Any = None, **fields: Any) -> Plan:
    sampler = samplers.fixed_languages(
        table.rows, len(context.splits.train), context.study.batch_size, logits, names=table.languages,
        targets_per_round=s.targets(table),
    )  # fmt: skip
    return sampled_plan(context, sampler, **fields)


def _dds(s: MultilingualDds, context: Context) -> Plan:
    found, model = _languages(context), context.model()
    table, key = found.table, jax.random.key(context.seed)
    part = probed(context, model, s.gradient_blocks, "gradient-blocks")
    sampler = samplers.multilingual_dds(
        table.rows, len(context.splits.train), context.study.batch_size, jax.eval_shape(model.init, key)[0],
        table.languages.index(found.specific), names=table.languages, targets_per_round=s.targets(table),
        scorer_steps=s.scorer_steps, scorer_batch_size=s.scorer_batch_size, gradient_decay=s.gradient_decay,
        similarity=s.reward, reward_scale=s.reward_scale, estimator=s.estimator, specific_rows=s.specific_rows,
        units=s.scorer_units, temperature=s.temperature, learning_rate=s.scorer_learning_rate, param_filter=part,
        gradient_dtype=jnp.dtype(s.gradient_dtype),
    )  # fmt: skip

    def begin() -> Any:
        assert isinstance(s, TcsDds)
        return samplers.fit_scorer(
            key, table.rows, _logits(s, found), units=s.scorer_units, temperature=s.temperature
        ).params

    return sampled_plan(
        context, sampler, begin=begin if isinstance(s, TcsDds) else None, learned=True,
        through_optimizer=s.through_optimizer,
    )  # fmt: skip


def _languages(context: Context) -> SourceLanguages:
    found = context.splits.languages
    assert found is not None
    return found


def _similarities(found: SourceLanguages, ngrams: int) -> Mapping[str, float]:
    return _compared(found.sentences, found.table.languages, found.specific, ngrams)


@functools.cache  # several methods and seeds ask for the same
def _compared(
    sentences: Callable[[str], Sequence[str]], names: tuple[str, ...], specific: str, ngrams: int
) -> Mapping[str, float]:
    return similarities({name: sentences(name) for name in names}, specific, most=ngrams)


def _logits(s: Tcs, found: SourceLanguages) -> list[float]:
    similar = _similarities(found, s.ngrams)
    return [similar[name] / s.similarity_temperature for name in found.table.languages]


def _lacks(splits: Splits) -> str:
    return "" if splits.languages else "pairs of several source languages, as --data.source-language az,tr has them"


SPECS: dict[str, Spec] = {
    "uniform_pairs": Spec(Rounds, _pairs, lacks=_lacks),
    "uniform_languages": Spec(Rounds, _uniform, lacks=_lacks),
    "related": Spec(Related, _related, lacks=_lacks),
    "tcs": Spec(Tcs, _tcs, lacks=_lacks),
    "multilingual_dds": Spec(
        MultilingualDds, _dds, paper={"scorer_steps": 1, "targets_per_round": 20_000, "estimator": "sum"}, lacks=_lacks
    ),
    "tcs_dds": Spec(TcsDds, _dds, paper={"targets_per_round": 20_000, "estimator": "sum"}, lacks=_lacks),
}
