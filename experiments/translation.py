"""Translation with learned data weights (Grangier, Ablin, Hannun: ATD, section 5.3, tables 1, 4 and 8).

    python -m experiments.translation
    python -m experiments.translation --data.generic "web/train.{en,cs}.gz" --data.specific mine/ --data.target-language cs \
      --compare uniform,soba,dds,classifier --steps 6000 --seeds 3 --run-dir runs/mine

The default command compares soba with uniform, 1,500 steps each, on English–French pairs that come with Python packages. It ended
with a test loss of 4.851 (uniform) and 4.257 (soba) nats per piece, BLEU 1.9 and 5.3 (2026-11-29, jax 0.10.2, an Intel Xeon).
The paper (table 4, before and after fine-tuning): loss 2.56 and 2.53 (uniform), 2.39 and 2.38 (soba), 2.37 and 2.35 (classifier).

Several source languages, for one that is rare (Wang et al., DDS, section 3.2, table 1 right):

    python -m experiments.translation --data.source-language az,tr,be,ru,gl,pt --data.target-language en --model.network lstm \
      --data.generic talks/train.tsv --data.specific talks/ --compare uniform_languages,tcs,multilingual_dds,tcs_dds

The same as `bilevel compare translation`; `--help` lists all flags. It needs the extra `translation`.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["compare", "translation", *sys.argv[1:]])
