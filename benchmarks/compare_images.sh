#!/usr/bin/env bash
# Classification on real images: MNIST with 10 and 40 % wrong labels, CIFAR-10 with right labels and with the worst human labels
# of CIFAR-10N; seven methods, and RHO-LOSS with a small scorer on MNIST.
# usage: benchmarks/compare_images.sh DATA_DIR RUN_DIR [SEEDS]   (DATA_DIR/image holds mnist_*.npz and cifar10*.npz)
set -euo pipefail
images=$1/image runs=$2 seeds=${3:-3}
methods=uniform,dds,rho_loss,train_loss,gradient_norm,gradient_norm_is,irreducible_loss
common=(--seeds "$seeds" --steps 3000 --evaluate-every 50 --log-every 50 --checkpoint-every 1000)
rows=(--data.limit 20000 --data.specific-rows 1000 --data.held-out 5000)

for fraction in 0.1 0.4; do
  mnist=(--data.source "$images/mnist" --data.noise-fraction "$fraction" "${rows[@]}" "${common[@]}")
  bilevel compare image_classification --compare "$methods" --run-dir "$runs/mnist-$fraction" "${mnist[@]}" \
    --model.weighting-bound 2
  table=$(echo "$runs/mnist-$fraction/prepared/irreducible-"*/table.safetensors)
  bilevel compare image_classification --compare rho_loss --run-dir "$runs/mnist-$fraction-small-scorer" "${mnist[@]}" \
    --rho-loss.network mlp-small --rho-loss.table "$table"
done

for labels in none "$images/cifar10n_train_labels.npz:worse_label"; do
  bilevel compare image_classification --compare "$methods" --run-dir "$runs/cifar10-${labels##*:}" \
    --data.source "$images/cifar10" --data.noise "$labels" "${rows[@]}" "${common[@]}" --model.network cnn-small \
    --model.weighting-bound 2
done
