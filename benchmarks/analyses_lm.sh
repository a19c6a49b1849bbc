#!/usr/bin/env bash
# The five analyses on real text, size XS, 6,000 steps, one seed (more by --seeds).
# usage: benchmarks/analyses_lm.sh DATA_DIR RUN_DIR [MORE FLAGS …]
#   DATA_DIR holds lm/generic and lm/specific; it continues where it stopped.
set -euo pipefail
lm=$1/lm runs=$2
generic=(--steps 6000 --data.generic "$lm/generic/train.txt.gz" --data.generic-labels "$lm/generic/train.labels.tsv.gz")
reuters=(--data.specific "$lm/specific/reuters")
analyse() { bilevel analyse "$1" language_modeling --run-dir "$runs/$1" "${generic[@]}" "${@:2}"; }

analyse curriculum "${reuters[@]}" "${@:3}"
analyse filters "${reuters[@]}" "${@:3}"
analyse acceleration --rows 1024 --specific-sets "$lm/specific/rct_abstracts" "$lm/specific/reuters" "$lm/specific/kjv_bible" "${@:3}"
analyse multi_task --specific-sets "$lm/specific/rct_abstracts" "$lm/specific/reuters" "$lm/specific/kjv_bible" "${@:3}"
analyse transfer --small xs --large small "${reuters[@]}" "${@:3}"
