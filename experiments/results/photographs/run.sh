#!/usr/bin/env bash
# Every run of this folder, one after the other, most telling first; the same command goes on.
#
#     DATA=data OUT=runs/photographs nice bash experiments/results/photographs/run.sh
#
# From the project's root, in its environment, CIFAR-10 prepared in DATA. On two CPU cores without
# other work: half an hour for a network of 20 layers, an hour and a half for one of 56 or the VGG,
# five to seven hours for the whole recipe, and about five for DenseNet-40.
set -euo pipefail
: "${DATA:=data}" "${OUT:=runs/photographs}" "${PYTHON:=python}"

# Twelve epochs of the recipe, the rate divided by 10 after 6 and 9.
twelve() {
    "$PYTHON" experiments/sweep.py --config=configs/cifar10.py --epochs 12 --set eval_every_epochs=1 checkpoint_every_epochs=1 --data_dir="$DATA" --out="$OUT/twelve" "$@"
}
twelve --models plain20 resnet20 --seeds 0
twelve --models resnet56 plain56 --seeds 0
twelve --models plain20 resnet20 --seeds 1
twelve --models resnet56,model.survival_probability=0.5 vgg15_width128 --seeds 0

# Ten epochs: the recipe of today, and the paper's schedule cut to as many.
for config in cifar10_fast cifar10; do
    "$PYTHON" experiments/sweep.py --config="configs/$config.py" --epochs 10 --data_dir="$DATA" --out="$OUT/$config" --models resnet20 --seeds 0 1 2
done

"$PYTHON" experiments/train.py --config=configs/cifar10.py:resnet20 --config.dataset.data_dir="$DATA" --workdir="$OUT/resnet20"

twelve --models preact_resnet56 densenet22_k12 --seeds 0
twelve --models densenet40_k12 --seeds 0
