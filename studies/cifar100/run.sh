#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/cifar100/run.sh CIFAR100 WEIGHTS OUT
#
# CIFAR100: a folder with CIFAR-100, in any form. WEIGHTS: an ImageNet ResNet-50, a state_dict. OUT: where checkpoints and
# results go. On one H100 the runs published here took six minutes, in three commands side by side.
set -euo pipefail
cifar=$(realpath "$1") weights=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."

where=(--data_dir "$cifar" --checkpoint_dir "$out/checkpoints" --results_dir "$out/results" --compile on)
python train.py --model_job teacher --epochs 8 --scheduler_step 3 --weights "$weights" "${where[@]}" --resume
python reproduce.py --epochs 10 "${where[@]}" --jobs student distillation distillation_{KMJ2,KMJ1,KMJ0,LDH,LDH2,LDH3,LDH5,LDH6,LDH9,LDH10}
python reproduce.py --epochs 10 "${where[@]}" --jobs student distillation distillation_{KMJ0,LDH,LDH5,LDH6,LDH9,LDH10} --seeds 1
python -m report "$out/results" --claims
