"""Write the interface miniature of multilingual DDS: messages of programs in eight languages, one of them made rare.

    python -m benchmarks.language_data --data-dir DATA --output mini --language gl

Writes train.tsv, dev.tsv and test.tsv, a column for each language. In train the language keeps 300 translations (sk 2,400),
chosen by a hash of the English text. Ukrainian is left out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import os
from pathlib import Path

LANGUAGES = ("az", "tr", "be", "ru", "gl", "pt", "sk", "cs")
KEPT = {"sk": 2400}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Write the interface miniature of multilingual DDS.")
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("BILEVEL_DATA"), required="BILEVEL_DATA" not in os.environ
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--language", choices=LANGUAGES, required=True, help="the language that is made rare")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for part in ("train", "dev", "test"):
        with gzip.open(given.data_dir / "mt/interface" / f"{part}.tsv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if part == "train":
            thin(rows, given.language, KEPT.get(given.language, 300))
        lines = ["\t".join(("en", *LANGUAGES)), *("\t".join(row[name] for name in ("en", *LANGUAGES)) for row in rows)]
        (given.output / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def thin(rows: list[dict[str, str]], language: str, keep: int) -> None:
    """Remove all translations into a language but some, chosen by a hash of the English text."""
    own = sorted((row for row in rows if row[language]), key=lambda row: hashlib.sha256(row["en"].encode()).digest())
    for row in own[keep:]:
        row[language] = ""


if __name__ == "__main__":
    main()
