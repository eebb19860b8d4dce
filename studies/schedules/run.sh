#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/schedules/run.sh CIFAR100 TEACHER OUT [FLAGS]
#
# As studies/benchmark/run.sh, FLAGS and PROCESSES too. 10 epochs each: some 15 minutes of a CPU core with AVX512_BF16 for
# the student alone, longer with a live teacher.
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
printf '%s\n' student {mse,kd,dkd}_{0.7,per_epoch,per_iteration,first_epoch} | xargs -n 1 -P "${PROCESSES:-2}" \
    python reproduce.py --suite schedules --data_dir "$cifar" --teacher "$teacher" \
    --teacher_arch resnet56 --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761 \
    --student_arch resnet20 --training benchmark --epochs 10 --seeds 0 1 "${@:4}" \
    --checkpoint_dir "$out/checkpoints" --results_dir "$out/results" --jobs
