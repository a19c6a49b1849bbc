"""Language modelling with learned data weights (Grangier, Ablin, Hannun: ATD, section 5.2, tables 1 to 3).

    python -m experiments.language_modeling
    python -m experiments.language_modeling --data.generic "heap/*.txt.gz" --data.specific my_domain/ \
      --compare uniform,soba,dds,anograd --steps 6000 --seeds 3 --run-dir runs/my_domain

The default command compares soba with uniform on text that ships with Python, 3,000 steps each. On one core of an Intel Xeon,
with others at work, it ended after 8.2 minutes with a test loss of 2.077 (uniform) and 1.703 (soba) nats per byte (2026-11-30,
jax 0.10.2).
The paper (tables 2 and 3): soba lowers the loss of uniform on Reuters, and on the other specific sets, before and after
fine-tuning.
The same as `bilevel compare language_modeling`; `--help` lists all flags.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["compare", "language_modeling", *sys.argv[1:]])
