"""Tiny parallel text: sentences translated by a word list; half of the generic pairs are like the specific ones, some wrong."""

from pathlib import Path
from typing import Any

import numpy as np

ANIMALS = {"cat": "kocka", "dog": "pes", "fox": "liska", "owl": "sova", "hen": "slepice", "bee": "vcela"}
TOOLS = {"saw": "pila", "axe": "sekera", "nail": "hrebik", "rope": "lano", "file": "pilnik", "oil": "olej"}
VERBS = {"sees": "vidi", "wants": "chce", "finds": "najde"}
LENGTH, PIECES = 20, 60
DOMAINS = ("tools", "animals")


def pairs(rng: np.random.Generator, words: dict[str, str], count: int) -> list[tuple[str, str]]:
    """Draw sentences of the form noun, verb, noun, number."""
    nouns, verbs = [*words.items()], [*VERBS.items()]
    found = []
    for one, verb, other, number in rng.integers(0, (len(nouns), len(verbs), len(nouns), 100), (count, 4)):
        said = (nouns[one], verbs[verb], nouns[other], (str(number), str(number)))
        source, target = (" ".join(word[side] for word in said) for side in (0, 1))
        found.append((source, target))
    return found


def write_pairs(folder: Path) -> Path:
    """Write generic.tsv with labels.tsv (every fourth animal pair is copied) and specific/{train,valid,test_a,test_b}.tsv."""
    rng = np.random.default_rng(0)
    rows = [(*pair, "tools", "none") for pair in pairs(rng, TOOLS, 150)]
    for i, (source, target) in enumerate(pairs(rng, ANIMALS, 150)):
        rows.append((source, source, "animals", "copied") if i % 4 == 0 else (source, target, "animals", "none"))
    order = rng.permutation(len(rows))
    lines = ["en\tcs", *("\t".join(rows[i][:2]) for i in order)]
    (folder / "generic.tsv").write_text("\n".join(lines) + "\n")
    (folder / "labels.tsv").write_text("".join("\t".join(rows[i][2:]) + "\n" for i in order))
    (folder / "specific").mkdir()
    for part, count in (("train", 60), ("valid", 20), ("test_a", 20), ("test_b", 12)):
        lines = ["en\tcs", *("\t".join(pair) for pair in pairs(rng, ANIMALS, count))]
        (folder / "specific" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def pair_flags(folder: Path, **given: Any) -> dict[str, Any]:
    """Return the flags that name the pairs, and small networks."""
    return {
        "data__generic": folder / "generic.tsv", "data__specific": folder / "specific", "data__cache_dir": folder / "cache",
        "data__target_language": "cs", "data__length": LENGTH, "data__vocabulary": PIECES, "optimizer__warmup": 2,
        "model__weighting_width": 4, "model__weighting_hidden": 8, "model__beam": 2, **given,
    }  # fmt: skip


def write_languages(folder: Path) -> Path:
    """Write {train,dev,test}.tsv with the columns en, aa, bb, zz: aa is rare, bb differs from it in a letter, zz in all."""
    rng = np.random.default_rng(0)
    shift = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абвгдежзийклмнопрстуфхцчшщ")
    for part, count in (("train", 90), ("dev", 40), ("test", 24)):
        lines = ["en\taa\tbb\tzz"]
        for number, (english, aa) in enumerate(pairs(rng, ANIMALS, count)):
            has = (part != "train" or number % 6 == 0, number % 3 > 0, number % 2 == 0 or number % 3 == 0)
            texts = (aa, aa.replace("k", "g"), aa.translate(shift))
            lines.append("\t".join([english, *(text if given else "" for text, given in zip(texts, has, strict=True))]))
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def language_flags(folder: Path, **given: Any) -> dict[str, Any]:
    """Return the flags that name these languages, and a small network."""
    return {
        "data__generic": folder / "train.tsv", "data__specific": folder, "data__cache_dir": folder / "cache",
        "data__source_language": "aa,bb,zz", "data__target_language": "en", "data__length": 26, "data__vocabulary": 40,
        "model__network": "lstm", "model__hidden": 8, "model__embedding": 8, "model__beam": 1, "optimizer__warmup": 2, **given,
    }  # fmt: skip
