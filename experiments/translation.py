"""Translation with learned data weights (Grangier, Ablin, Hannun: ATD, section 5.3, tables 1, 4 and 8).

    python -m experiments.translation
    python -m experiments.translation --data.generic "web/train.{en,cs}.gz" --data.specific mine/ --data.target-language cs \
      --compare uniform,soba,dds,classifier --steps 6000 --seeds 3 --run-dir runs/mine

The same as `bilevel compare translation`; `--help` lists all flags. It needs the extra `translation`.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["compare", "translation", *sys.argv[1:]])
