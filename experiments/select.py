"""Select the documents of any corpus that a trained weighting network prefers.

The weighting network is that of Grangier et al. (ATD), section 5.2; ranking whole documents by it is ours.

    python -m experiments.language_modeling --compare soba --run-dir runs/mine
    python -m experiments.select --weights runs/mine/soba-seed0 --corpus "heap/*.jsonl.gz" --output selected \
      --keep-fraction 0.1

The same as `bilevel select`; `--help` lists all flags.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
