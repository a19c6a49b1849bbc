"""The captioned images that need no download: glyphs of matplotlib's fonts, and handwritten digits."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.data import (
    Captioned,
    embed_captions,
    images_in_both,
    open_captions,
    open_embedding,
    open_specific_captions,
    pack_captions,
)
from bilevel.types import UserError

for package in ("PIL", "matplotlib", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def glyphs() -> list[Captioned]:
    return list(open_captions().read())


def test_every_glyph_has_its_name(glyphs: list[Captioned]) -> None:
    assert len(glyphs) == 45_811
    assert len({item.caption for item in glyphs}) == 7346
    domains = Counter(item.labels[0] for item in glyphs)
    assert domains == {
        "letters": 31_161, "symbols": 9636, "punctuation": 1999, "marks": 1551, "numbers": 797, "digits": 667,
    }  # fmt: skip
    assert Counter(item.labels[1] for item in glyphs) == {"none": 45_300, "wrong caption": 511}
    both = {(np.asarray(item.picture).tobytes(), item.caption) for item in glyphs}
    assert len(both) == len(glyphs)


def test_glyphs_fit_their_image(glyphs: list[Captioned]) -> None:
    images = np.stack([np.asarray(item.picture) for item in glyphs])
    assert (images.shape[1:], images.dtype) == ((32, 32, 1), np.uint8)
    assert images.max((1, 2, 3)).min() > 20  # none is blank
    ink = images[..., 0] > 0
    for axis in (1, 2):
        lines: Any = ink.any(axis)
        before, behind = lines.argmax(1), lines[:, ::-1].argmax(1)
        assert np.abs(before - behind).max() <= 2  # in the middle


def test_captions_tell_the_glyphs(glyphs: list[Captioned]) -> None:
    fives = [item for item in glyphs if item.caption == "digit five"]
    assert len(fives) > 20
    assert Counter(item.labels[1] for item in fives)["none"] > 15
    mean = np.mean([np.asarray(item.picture, float) for item in fives if item.labels[1] == "none"], axis=0)
    others = {
        name: np.mean(
            [np.asarray(i.picture, float) for i in glyphs if i.caption == name and i.labels[1] == "none"], axis=0
        )
        for name in ("digit one", "digit four", "comma")
    }
    one = np.asarray(next(i for i in glyphs if i.caption == "digit five" and "Mono.ttf" in i.where).picture, float)
    assert all(np.square(one - mean).sum() < np.square(one - other).sum() for other in others.values())


def test_faults_are_those_of_the_order_of_tex(glyphs: list[Captioned]) -> None:
    faults = {item.where: item.labels for item in glyphs if item.labels[1] != "none"}
    assert all(where.startswith("cm") for where in faults)
    assert faults["cmsy10.ttf, digit one"] == ("symbols", "wrong caption")  # infinity
    assert "cmmi10.ttf, digit one" not in faults  # an old-style digit
    assert "cmr10.ttf, digit one" not in faults


def test_digits() -> None:
    parts = open_specific_captions()
    assert parts.class_names[5] == "five"
    assert parts.class_captions[5] == "digit five"
    counts = [Counter(item.label for item in source.read()) for source in (parts.train, parts.valid)]
    assert counts == [dict.fromkeys(range(10), 30), dict.fromkeys(range(10), 50)]
    assert sum(1 for _ in parts.test["test"].read()) == 997
    assert {item.caption for item in parts.test["test"].read() if item.label == 3} == {"digit three"}
    other = open_specific_captions(per_class=(5, 5), template="a {}")
    assert sum(1 for _ in other.train.read()) == 50
    assert other.class_captions[0] == "a zero"


def test_digits_as_rows(tmp_path: Path) -> None:
    parts = open_specific_captions()
    train, test = (pack_captions(source, cache_dir=tmp_path) for source in (parts.train, parts.test["test"]))
    assert not images_in_both(train, test).any()
    kinds = ("small letter", "large letter", "small digit", "large digit")
    names = [f"{kind} {digit}" for kind in kinds for digit in parts.class_names]
    embedding = open_embedding("lsa", names, dimensions=8, cache_dir=tmp_path)
    batch = embed_captions(train, embedding, cache_dir=tmp_path).rows(np.arange(20))
    assert (batch["image"].shape, batch["small"].shape, batch["text"].shape) == (
        (20, 32, 32, 3),
        (20, 16, 16, 3),
        (20, 8),
    )
    classes = embedding(parts.class_captions)
    np.testing.assert_array_equal(batch["text"], classes[batch["label"]])


@pytest.mark.parametrize(("spec", "module"), [("matplotlib:glyphs", "matplotlib"), ("sklearn:digits", "sklearn")])
def test_a_missing_package(spec: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{spec} needs .*pip install 'bilevel\[experiments\]'"):
        open_captions(spec)
