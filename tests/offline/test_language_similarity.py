"""The overlap of frequent n-grams, by hand and on real text."""

import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bilevel.offline.language_similarity import frequent_ngrams, similarities
from bilevel.types import UserError


def by_hand(sentences: list[str], most: int, longest: int = 4) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for word in " ".join(sentences).split():
        for n in range(1, longest + 1):
            found.update(word[i : i + n] for i in range(len(word) - n + 1))
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:most]


def test_a_toy() -> None:
    # a 3, b 2, ab 2, and aa 1, aab 1 before others of count 1: "aab ab"
    found = frequent_ngrams(["aab ab"], most=4)
    assert found.texts == ["a", "ab", "b", "aa"]
    assert found.counts.tolist() == [3, 2, 2, 1]
    texts = {"s": ["aab ab"], "near": ["ab", "ab", "ac"], "far": ["xy", "xy zb"]}
    # 4 each: near {a, ab, b, ac}; far {x, xy, y, b}
    assert similarities(texts, "s", most=4) == {"s": 1.0, "near": 3 / 4, "far": 1 / 4}


@pytest.mark.parametrize(("most", "longest"), [(5, 1), (40, 2), (300, 4), (10_000, 4), (200, 7)])
def test_ngrams_of_random_text(most: int, longest: int) -> None:
    rng = np.random.default_rng(0)
    letters = np.array([*"abcdeéя𝄞 \t"])
    sentences = ["".join(rng.choice(letters, 30)) for _ in range(60)] + ["", " "]
    found = frequent_ngrams(sentences, most=most, longest=longest)
    assert list(zip(found.texts, found.counts.tolist(), strict=True)) == by_hand(sentences, most, longest)


def test_languages_with_few_ngrams_are_compared_by_as_many(capsys: pytest.CaptureFixture[str]) -> None:
    found = similarities({"s": ["ab"], "other": ["abab cd cd cd cd"]}, "s", most=100)
    # s has {a, ab, b}; the three most frequent of the other: c, cd, d
    assert found == {"s": 1.0, "other": 0.0}
    assert capsys.readouterr().err == (
        "note: languages are compared by their 3 most frequent n-grams instead of 100: s has no more.\n"
    )


def test_mistakes() -> None:
    with pytest.raises(UserError, match="There is no text of 'az', but of tr"):
        similarities({"tr": ["a"]}, "az")
    with pytest.raises(UserError, match="The text of 'tr' is empty"):
        similarities({"az": ["a"], "tr": ["", " "]}, "az")
    with pytest.raises(UserError, match="most=0 and longest=4 must both be at least 1"):
        frequent_ngrams(["a"], most=0)


@pytest.mark.data
def test_real_languages() -> None:
    """Published for the whole of the talks: .484, .321 and .660."""
    folder = Path(os.environ.get("BILEVEL_DATA", "")) / "mt" / "ted"
    if not os.environ.get("BILEVEL_DATA") or not folder.exists():
        pytest.skip("BILEVEL_DATA does not name a folder with mt/ted")

    def text(name: str) -> list[str]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            return [line.rstrip("\n").split("\t")[1] for line in file]

    expected = {"az": ("tr", 0.465), "be": ("ru", 0.314), "gl": ("pt", 0.581)}
    for language, (kin, value) in expected.items():
        texts = {language: text(f"train.en-{language}.tsv.gz"), kin: text(f"related.en-{kin}.tsv.gz")}
        # As computed elsewhere, where words and ties may have been cut otherwise.
        assert similarities(texts, language)[kin] == pytest.approx(value, abs=0.01)
