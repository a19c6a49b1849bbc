"""Write the English–Czech miniature of ATD's translation experiment: generic pairs of three domains, some of them wrong.

    python -m benchmarks.translation_data --data-dir DATA --output mini [--captions 10000] [--no-hidden]

Specific: captions of Multi30k, chosen by a hash (1,000, or 10,000); valid is its val, test 2016 and 2018. Generic, 46,184 pairs:
28,868 verses, 6,316 messages of programs, 6,000 other captions of which half have the translation of another one (rotated), 4,000
verses in Spanish or Portuguese (wrong_language), and 1,000 copies of the source (copied). `generic.labels.tsv.gz` has domain and
fault of each.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HIDDEN, ROTATED, WRONG_LANGUAGE, COPIED = 6_000, 3_000, 4_000, 1_000
MOST_SPECIFIC = 10_000


class Row(NamedTuple):
    """A generic pair and what is known of it."""

    source: str
    target: str
    domain: str
    fault: str = "none"


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Write the English–Czech miniature.")
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("BILEVEL_DATA"), required="BILEVEL_DATA" not in os.environ
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=1000, help="specific pairs to learn weights from")
    parser.add_argument(
        "--hidden", action=argparse.BooleanOptionalAction, default=True, help="other captions among the generic"
    )
    given = parser.parse_args()
    data = Path(given.data_dir) / "mt"
    captions = by_hash(_aligned(data / "multi30k", "train"))
    rows = _generic(data, captions[MOST_SPECIFIC : MOST_SPECIFIC + HIDDEN] if given.hidden else [])
    _write(given.output / "generic.tsv.gz", [("en", "cs"), *((row.source, row.target) for row in rows)])
    _write(given.output / "generic.labels.tsv.gz", ((row.domain, row.fault) for row in rows))
    parts = {"train": captions[: given.captions], "valid": _aligned(data / "multi30k", "val")}
    parts |= {f"test_{year}": _aligned(data / "multi30k", f"test_{year}_flickr") for year in (2016, 2018)}
    for name, pairs in parts.items():
        _write(given.output / "specific" / f"{name}.tsv.gz", [("en", "cs"), *pairs])


def by_hash(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return pairs in the order of a hash of their source sentence."""
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _generic(data: Path, hidden: list[tuple[str, str]]) -> list[Row]:
    verses = {language: dict(_table(data / "bible" / f"{language}.tsv.gz")) for language in ("en", "cs", "es", "pt")}
    bible = [(verses["en"][key], text) for key, text in verses["cs"].items() if key in verses["en"]]
    with gzip.open(data / "interface/train.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        messages = [(row["en"], row["cs"]) for row in table if row["cs"]]
    others = [
        (verses["en"][key], text)
        for language in ("es", "pt")
        for key, text in by_hash(verses[language].items())[:WRONG_LANGUAGE]
        if key in verses["en"]
    ]
    rotated, right = hidden[:ROTATED], hidden[ROTATED:]
    turned = [target for _, target in rotated[1:] + rotated[:1]]
    rows = [
        *(Row(*pair, "bible") for pair in bible),
        *(Row(*pair, "interface") for pair in messages),
        *(Row(*pair, "captions") for pair in right),
        *(Row(source, target, "captions", "rotated") for (source, _), target in zip(rotated, turned, strict=True)),
        *(Row(*pair, "bible", "wrong_language") for pair in by_hash(others)[:WRONG_LANGUAGE]),
        *(Row(source, source, "bible", "copied") for source, _ in by_hash(bible)[: COPIED // 2]),
        *(Row(source, source, "interface", "copied") for source, _ in by_hash(messages)[: COPIED // 2]),
    ]
    return sorted(rows, key=lambda row: hashlib.sha256("\t".join(row).encode()).digest())


def _aligned(folder: Path, name: str) -> list[tuple[str, str]]:
    sides = []
    for code in ("en", "cs"):
        with gzip.open(folder / f"{name}.{code}.gz", "rt", encoding="utf-8") as lines:
            sides.append(lines.read().splitlines())
    return list(zip(*sides, strict=True))


def _table(file: Path) -> list[tuple[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        found = [line.rstrip("\n").split("\t") for line in lines]
    return [(key, text) for key, text in found if text]


def _write(file: Path, rows: Iterable[Iterable[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(file, "wb", mtime=0) as out:
        out.writelines(("\t".join(" ".join(cell.split()) for cell in row) + "\n").encode() for row in rows)


if __name__ == "__main__":
    main()
