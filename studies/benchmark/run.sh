#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/benchmark/run.sh CIFAR100 TEACHER OUT
#
# CIFAR100: a folder with CIFAR-100, in any form. TEACHER: chenyaofo's cifar100_resnet56 (72.63 %). OUT: where
# checkpoints and results go. A step of 64 images takes some 66 ms on two CPU cores with AVX512_BF16, so the 240 epochs
# of a student take 3.5 hours there; the others are run for 60 epochs, milestones in proportion, beside a student and a
# kd of 60 epochs, as only runs of equal length are compared.
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
suite=(--suite benchmark --data_dir "$cifar" --teacher "$teacher"
    --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761)
short=(--epochs 60 --checkpoint_dir "$out/60/checkpoints" --results_dir "$out/60/results")
long=(--checkpoint_dir "$out/240/checkpoints" --results_dir "$out/240/results")
python reproduce.py "${suite[@]}" "${short[@]}" --jobs student kd dkd dist rld at sp crd reviewkd
python reproduce.py "${suite[@]}" "${long[@]}" --jobs student kd
python reproduce.py "${suite[@]}" "${short[@]}" --jobs student kd dkd --seeds 1 2
