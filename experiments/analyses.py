"""Analyses of learned weights (Grangier, Ablin, Hannun: ATD, sections 6.1 to 6.4 and appendix B).

    python -m experiments.analyses curriculum
    python -m experiments.analyses filters
    python -m experiments.analyses acceleration --specific-sets news/ law/ medicine/
    python -m experiments.analyses transfer --small small --large large
    python -m experiments.analyses multi_task --specific-sets news/ law/ medicine/

Each prints a table, and writes it (Markdown, JSON) with a plot (SVG) and all runs into --run-dir. The same command continues
an analysis that was stopped, and does not repeat what is finished. Questions, and cost for each seed:

    curriculum   Is what was learned a distribution or a curriculum? (table 6)       one of --learner, three of frozen
    filters      Which rule should pick the batch? (table 7)                         one for each of --filters
    acceleration Do gradient alignments say what learned weights gain? (table 8)     two for each of --specific-sets
    transfer     Do weights of a small model serve a large one? (tables 9 and 10)    one of the small model, three of the large
    multi_task   What if there are several specific sets? (table 12)                 one for each of --compare, and fine-tuning;
                                                                                     a quarter for each fraction mixing tries

--task names another task than language_modeling, or a file with one; the same as `bilevel analyse NAME TASK`, whose --help lists
all flags.
"""

import sys

from bilevel.cli import main
from bilevel.training.settings import taken

if __name__ == "__main__":
    task, arguments = taken(sys.argv[1:], "--task")
    main(["analyse", *arguments[:1], task or "language_modeling", *arguments[1:]])
