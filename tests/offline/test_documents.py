"""The choice of documents by their scores."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bilevel.offline.choice import Choice, Rule, choose
from bilevel.offline.documents import digests, drawn_ranks, highest_documents
from bilevel.types import UserError


def test_the_choice_is_that_of_a_stable_sort() -> None:
    rng, values = np.random.default_rng(0), np.array([-3.5, -0.0, 0.0, 0.25, 1e-30, 7.0], np.float32)
    scores = [rng.choice(values, 20 * part).astype(np.float32) for part in range(5)]
    whole, owner = np.concatenate(scores), np.repeat(np.arange(5), [len(x) for x in scores])
    for count in (1, 2, 57, 100, 143, 199, 200):
        threshold, kept = highest_documents(scores, count)
        order = np.argsort(-whole, kind="stable")[:count]
        assert np.flatnonzero(np.concatenate(kept)).tolist() == sorted(order)
        assert [len(own) for own in kept] == np.bincount(owner, minlength=5).tolist()
        assert threshold == whole[order[-1]]


def test_documents_are_drawn_in_proportion() -> None:
    """The first draws follow the softmax of score / temperature; the noise of seeds and parts differs."""

    def drawn(seed: int, part: int, scores: list[float], temperature: float = 1.0) -> NDArray[np.float32]:
        return drawn_ranks(np.array(scores, np.float32), temperature, (seed, part))

    first = [int(np.argmax(drawn(seed, 4, [0.0, 2.0, 4.0], 2.0))) for seed in range(4000)]
    wanted = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    np.testing.assert_allclose(np.bincount(first, minlength=3) / 4000, wanted, atol=0.03)
    noise = drawn(1, 2, [0.0] * 1000)
    np.testing.assert_array_equal(noise, drawn(1, 2, [0.0] * 1000))
    for seed, part in ((2, 2), (1, 3)):
        assert abs(np.corrcoef(noise, drawn(seed, part, [0.0] * 1000))[0, 1]) < 0.15


def test_copies_beyond_the_limit_are_never_kept(tmp_path: Path) -> None:
    """The rest is chosen as if they were not there, also by a choice that was saved; the quantiles stay those of all."""
    rng = np.random.default_rng(1)
    owner = [rng.integers(0, 12, count) for count in (20, 5, 15)]
    texts, scores = [digests([b"%d" % i for i in own]) for own in owner], [own.astype(np.float32) for own in owner]
    whole, first = np.concatenate(owner), np.zeros(40, bool)
    for text in range(12):
        first[np.flatnonzero(whole == text)[:2]] = True
    for rule, count in ((Rule(keep_count=7, max_copies=2), 7), (Rule(keep_fraction=0.9, max_copies=2), first.sum())):
        choice = choose(scores, rule, "corpus", texts=texts)
        choice.save(tmp_path)
        for found in (choice, Choice.load(tmp_path)):
            kept = np.concatenate([found.kept_of(own, part) for part, own in enumerate(scores)])
            order = [i for i in np.argsort(-whole, kind="stable") if first[i]][:count]
            assert np.flatnonzero(kept).tolist() == sorted(order)
            assert sum(found.kept) == count
    above = choose(scores, Rule(keep_quantile=0.5, max_copies=2), "corpus", texts=texts)
    assert sum(above.kept) == (first & (above.quantiles(whole.astype(np.float32)) >= 0.5)).sum()
    drawn = choose(scores, Rule(keep_count=10, max_copies=1, rule="gumbel", temperature=5.0), "corpus", texts=texts)
    texts_kept = np.concatenate(
        [own[drawn.kept_of(s, part)] for part, (own, s) in enumerate(zip(owner, scores, strict=True))]
    )
    assert len(texts_kept) == len({*texts_kept}) == 10
    with pytest.raises(UserError, match=f"41 is more than the {first.sum()} documents with max_copies 2 in corpus"):
        choose(scores, Rule(keep_count=41, max_copies=2), "corpus", texts=texts)


def test_the_highest_of_each_group_are_kept(tmp_path: Path) -> None:
    """Copies that cannot be kept take no place in their group; equal scores go by their order in the corpus."""
    rng = np.random.default_rng(2)
    sizes = (20, 5, 15)
    group, text = (np.split(rng.integers(0, n, 40), np.cumsum(sizes)[:-1]) for n in (4, 30))
    scores = [rng.integers(0, 9, n).astype(np.float32) for n in sizes]
    groups, texts = ([digests([b"%d" % i for i in own]) for own in kind] for kind in (group, text))
    whole, of_group, of_text = (np.concatenate(x) for x in (scores, group, text))
    for rule in (Rule(keep_count=9, max_per_group=3), Rule(keep_count=8, max_per_group=2, max_copies=1)):
        choice = choose(scores, rule, "corpus", texts=texts, groups=groups)
        choice.save(tmp_path)
        wanted, seen = (
            [],
            [int(i) for i in np.arange(40) if rule.max_copies is None or i == np.argmax(of_text == of_text[i])],
        )
        for i in sorted(seen, key=lambda i: -whole[i]):
            if sum(of_group[j] == of_group[i] for j in wanted) < (rule.max_per_group or 0):
                wanted.append(i)
        for found in (choice, Choice.load(tmp_path)):
            kept = np.concatenate([found.kept_of(own, part) for part, own in enumerate(scores)])
            assert np.flatnonzero(kept).tolist() == sorted(wanted[: rule.keep_count])
    with pytest.raises(UserError, match="13 is more than the 12 documents with max_per_group 3 in corpus"):
        choose(scores, Rule(keep_count=13, max_per_group=3), "corpus", groups=groups)
    drawn = choose(scores, Rule(keep_count=8, max_per_group=2, rule="gumbel", temperature=3.0), "corpus", groups=groups)
    found = np.concatenate(
        [own[drawn.kept_of(s, part)] for part, (own, s) in enumerate(zip(group, scores, strict=True))]
    )
    assert np.bincount(found).tolist() == [2, 2, 2, 2]
