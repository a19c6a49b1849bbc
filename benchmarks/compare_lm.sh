#!/usr/bin/env bash
# The comparison in the README: three specific sets, three seeds, four methods, size XS, 6,000 steps.
# usage: benchmarks/compare_lm.sh DATA_DIR RUN_DIR   (DATA_DIR holds lm/generic and lm/specific)
set -euo pipefail
data=$1 runs=$2
for set in rct_abstracts reuters kjv_bible; do
  python -m experiments.language_modeling --compare uniform,soba,dds,anograd --steps 6000 --seeds 3 \
    --data.generic "$data/lm/generic/train.txt.gz" --data.generic-labels "$data/lm/generic/train.labels.tsv.gz" \
    --data.specific "$data/lm/specific/$set" --run-dir "$runs/$set"
done
