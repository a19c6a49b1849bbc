"""Images and captions with learned data weights (Grangier, Ablin, Hannun: ATD, section 5.4, tables 1, 5 and 8).

    python -m experiments.image_text
    python -m experiments.image_text --data.generic "shards/*.tar" --data.specific mine/ \
      --compare uniform,soba,dds,classifier --steps 6000 --seeds 3 --run-dir runs/mine

The default command compares soba with uniform, 1,500 steps each; it ended with a test accuracy of 0.095 (uniform) and 0.137
(soba), a loss of 3.874 and 3.117 (2026-11-29, jax 0.10.2, an AMD EPYC). More figures are in
benchmarks/RESULTS.md.
The paper (table 5, accuracy before and after fine-tuning): 41.1 and 54.9 (uniform), 41.1 and 53.9 (soba), 44.1 and 57.5
(classifier), 55.1 (mixing).

The same as `bilevel compare image_text`; `--help` lists all flags.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["compare", "image_text", *sys.argv[1:]])
