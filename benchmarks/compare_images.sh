#!/usr/bin/env bash
# The comparison in the README on real images: MNIST with 10 and 40 % wrong labels, CIFAR-10 with right labels and with the worst
# human labels of CIFAR-10N; seven methods, three seeds.
# usage: benchmarks/compare_images.sh DATA_DIR RUN_DIR [SEEDS]   (DATA_DIR/image holds mnist_*.npz and cifar10*.npz)
set -euo pipefail
images=$1/image runs=$2 seeds=${3:-3}
methods=uniform,dds,rho_loss,train_loss,gradient_norm,gradient_norm_is,irreducible_loss
common=(--compare "$methods" --seeds "$seeds" --evaluate-every 50 --log-every 50 --checkpoint-every 1000)

for fraction in 0.1 0.4; do
  python -m experiments.image_classification "${common[@]}" --steps 3000 --run-dir "$runs/mnist-$fraction" \
    --data.source "$images/mnist" --data.limit 20000 --data.dev 1000 --data.holdout 5000 --data.noise-fraction "$fraction"
done

for labels in none "$images/cifar10n_train_labels.npz:worse_label"; do
  python -m experiments.image_classification "${common[@]}" --steps 3000 --run-dir "$runs/cifar10-${labels##*:}" \
    --model.network cnn-small --data.source "$images/cifar10" --data.limit 20000 --data.dev 1000 --data.holdout 5000 \
    --data.noise "$labels"
done
