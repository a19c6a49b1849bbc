"""Any labelled arrays, rows of features, with learned data weights and online batch selection.

    python -m experiments.tabular
    python -m experiments.tabular --data.source my.csv --data.label species --data.noise none --compare all

The experiment of `experiments.image_classification` on a .npz, .csv or .parquet file; by default breast cancer data that come
with scikit-learn, 20 % of the training labels wrong. The same as `bilevel compare tabular`; `--help` lists all flags.
"""

import sys

from bilevel.cli import main

if __name__ == "__main__":
    main(["compare", "tabular", *sys.argv[1:]])
