#!/usr/bin/env bash
# The comparison in the README: three specific sets, three seeds, size XS, 6,000 steps, and fine-tuning.
# usage: benchmarks/compare_lm.sh DATA_DIR RUN_DIR [METHODS [MORE FLAGS …]]
#   DATA_DIR holds lm/generic and lm/specific; METHODS as --compare takes them (default: all); it continues where it stopped.
# The two settings of methods are those that did best on valid of rct_abstracts after a quarter of the steps (RESULTS.md).
set -euo pipefail
data=$1 runs=$2 methods=${3:-all}
lm=$data/lm
own=()
[[ ,$methods, =~ ,(all|mixing), ]] && own+=(--mixing.fraction 0.75)
[[ ,$methods, =~ ,(all|contrastive), ]] && own+=(--contrastive.fraction 0.03)
bilevel compare language_modeling --compare "$methods" --steps 6000 --seeds 3 --finetune.steps 1000 --run-dir "$runs" \
  "${own[@]}" \
  --data.generic "$lm/generic/train.txt.gz" --data.generic-labels "$lm/generic/train.labels.tsv.gz" \
  --specific-sets "$lm/specific/rct_abstracts" "$lm/specific/reuters" "$lm/specific/kjv_bible" "${@:4}"
