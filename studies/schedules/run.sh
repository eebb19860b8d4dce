#!/usr/bin/env bash
# The runs of this study; what is finished is skipped, what was interrupted goes on.
#
#   PROCESSES=6 studies/schedules/run.sh CIFAR100 TEACHER OUT --compile on
#
# CIFAR100, TEACHER, OUT, PROCESSES and the flags after them are studies/benchmark/run.sh's. For a GPU, on which it takes
# minutes; quarter/run.sh is for two cores of a CPU.
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

# A process for each line: a start of a few seconds, and compiling, is a good part of ten epochs.
lines=("student kd_0.7 kd_per_epoch kd_per_iteration kd_first_epoch"
    "dkd_0.7 dkd_per_epoch dkd_per_iteration dkd_first_epoch"
    "mse_0.7 mse_per_epoch" "mse_per_iteration mse_first_epoch")
for seed in 0 1; do printf "%s --seeds $seed\n" "${lines[@]}"; done | xargs -L 1 -P "${PROCESSES:-2}" \
    python reproduce.py --suite schedules --data_dir "$cifar" --teacher "$teacher" --teacher_arch resnet56 \
    --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761 --student_arch resnet20 \
    --training benchmark --epochs 10 "${@:4}" --checkpoint_dir "$out/checkpoints" --results_dir "$out/results" --jobs
