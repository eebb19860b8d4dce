#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/benchmark/run.sh CIFAR100 TEACHER OUT [FLAGS]
#
# CIFAR100: a folder with CIFAR-100, in any form. TEACHER: chenyaofo's cifar100_resnet56 (72.63 %). OUT: where
# checkpoints and results go. FLAGS: more of them for each command, on CUDA --compile on. A student alone, of all 240
# epochs, takes some six hours of a CPU core with AVX512_BF16, one with a live teacher longer; so the comparison is made at
# 30 epochs, milestones in proportion, beside a student and a kd of 30 epochs, as only runs of equal length are compared.
# Those two are also trained for all 240.
#
# For a CPU with two cores: networks so small get more done in two runs side by side, a thread each, than in one with two
# threads. PROCESSES=4 runs as many, for a GPU; they share it better under NVIDIA MPS (nvidia-cuda-mps-control -d).
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
common=(--data_dir "$cifar" --teacher "$teacher"
    --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761 "${@:4}")
short=(--epochs 30 --checkpoint_dir "$out/30/checkpoints" --results_dir "$out/30/results")
long=(--checkpoint_dir "$out/240/checkpoints" --results_dir "$out/240/results")

# Each line from stdin is what one process is to run, under the flags given.
side_by_side() {
    xargs -L 1 -P "${PROCESSES:-2}" python reproduce.py --suite benchmark "${common[@]}" "$@" --jobs
}

# In an order in which dkd and rld find the teacher's logits that kd left there.
printf '%s\n' student at kd sp dkd crd dist reviewkd rld {student,kd,reviewkd}" --seeds "{1,2} | side_by_side "${short[@]}"
# rld once more, by the weight that the authors of dkd have for this pair.
python train_distillation.py --loss rld --schedule "sum, warm-up" --mcd 2 --teacher_arch resnet56 --student_arch resnet20 \
    --training benchmark --epochs 30 "${common[@]}" \
    --checkpoint_dir "$out/30/checkpoints" --results_dir "$out/30/weights" --resume
printf '%s\n' student kd | side_by_side "${long[@]}"
