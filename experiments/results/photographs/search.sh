#!/usr/bin/env bash
# How `configs/cifar10_fast.py` is found: runs of 3 epochs, compared by 5,000 training images held out.
#
#     DATA=data OUT=runs/photographs nice bash experiments/results/photographs/search.sh
#
# Five minutes a run on two CPU cores without other work. The test set chooses nothing.
set -euo pipefail
: "${DATA:=data}" "${OUT:=runs/photographs}" "${PYTHON:=python}"

# What is not searched has been found before, or is a first guess.
search() {
    "$PYTHON" experiments/sweep.py --config=configs/cifar10_fast.py --models resnet20 --epochs 3 --set dataset.validation_size=5000 label_smoothing=0.05 schedule.warmup=2 schedule.learning_rate=0.4 optimizer.weight_decay=5e-4 --data_dir="$DATA" --out="$OUT/search" --grid "$@"
}
search schedule.learning_rate=0.1,0.2,0.4 optimizer.weight_decay=1e-4,5e-4
search schedule.learning_rate=0.8 optimizer.weight_decay=5e-4
search label_smoothing=0.0,0.1
search schedule.warmup=1,4
