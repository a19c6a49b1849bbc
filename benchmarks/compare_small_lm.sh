#!/usr/bin/env bash
# As compare_lm.sh, with little specific data: the first COUNT training documents of each set; the held-out parts are whole.
# usage: benchmarks/compare_small_lm.sh DATA_DIR RUN_DIR [COUNT [MORE FLAGS …]]
set -euo pipefail
lm=$1/lm runs=$2 count=${3:-300}
sets=()
for name in rct_abstracts reuters; do
  folder=$runs/specific/${name}_$count
  mkdir -p "$folder"
  gzip -dc "$lm/specific/$name/train.txt.gz" | sed -n "1,${count}p" > "$folder/train.txt"
  cp "$lm/specific/$name/"{valid,test}.txt.gz "$folder"
  sets+=("$folder")
done
compare() {
  bilevel compare language_modeling --compare "$1" --run-dir "$2" --steps 6000 --finetune.steps 1000 \
    --data.generic "$lm/generic/train.txt.gz" --data.generic-labels "$lm/generic/train.labels.tsv.gz" \
    --specific-sets "${sets[@]}" "${@:3}"
}
compare uniform,classifier,soba,warm_soba "$runs/learned" "${@:4}"
for fraction in 0.0625 0.25 0.5; do
  compare mixing "$runs/mixing_$fraction" --mixing.fraction "$fraction" "${@:4}"
done
