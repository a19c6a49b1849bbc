"""Will learned data weights help? SAR and GAR of a short uniform training (Grangier, Ablin, Hannun: ATD, section 6.3, table 8).

    python -m experiments.diagnose
    python -m experiments.diagnose --data.generic heap.txt.gz --data.specific my_domain.txt
    python -m experiments.diagnose --checkpoint runs/language_modeling/uniform-seed0
    python -m experiments.diagnose --task image_classification

Prints a table and a sentence, and writes them with a plot into --run-dir. It costs a fifth of a uniform run, and three
measurements. --task names another task, or a file with one; the same as `bilevel diagnose TASK`, whose --help lists all flags.
"""

import sys

from bilevel.cli import main
from bilevel.training.settings import taken

if __name__ == "__main__":
    task, arguments = taken(sys.argv[1:], "--task")
    main(["diagnose", task or "language_modeling", *arguments])
