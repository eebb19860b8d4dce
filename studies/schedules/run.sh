#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/schedules/run.sh CIFAR100 TEACHER OUT
#
# As studies/benchmark/run.sh; 20 epochs each, some 18 minutes on two CPU cores with AVX512_BF16.
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
python reproduce.py --suite schedules --data_dir "$cifar" --teacher "$teacher" --teacher_arch resnet56 \
    --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761 \
    --student_arch resnet20 --training benchmark --epochs 20 --seeds 0 1 \
    --jobs student {kd,dkd,mse}_{0.7,per_epoch,per_iteration,first_epoch} \
    --checkpoint_dir "$out/checkpoints" --results_dir "$out/results"
