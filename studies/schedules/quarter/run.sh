#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/schedules/quarter/run.sh CIFAR100 TEACHER OUT [FLAGS]
#
# CIFAR100: a folder with CIFAR-100 as PNGs, train/<class>/* and test/<class>/*. TEACHER, OUT and FLAGS are
# studies/benchmark/run.sh's, PROCESSES too. Some two and a half hours of two CPU cores with AVX2.
set -euo pipefail
cifar=$(realpath "$1") teacher=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1
if [ ! -d "$cifar/train" ]; then
    echo "run.sh: $cifar has no folder train; give one with CIFAR-100 as PNGs, train/<class>/* and test/<class>/*" >&2
    exit 2
fi

# Every fourth training image of each class, all test images.
mkdir -p "$out/images"
ln -sfn "$cifar/test" "$out/images/test"
for class in "$cifar"/train/*; do
    into="$out/images/train/$(basename "$class")"
    mkdir -p "$into"
    find "$class" -type f | sort | awk 'NR % 4 == 1' | xargs ln -sft "$into"
done

common=(--dataset folder --data_dir "$out/images" --teacher "$teacher" --teacher_arch resnet56
    --teacher_mean 0.5070,0.4865,0.4409 --teacher_std 0.2673,0.2564,0.2761 --student_arch resnet20
    --training benchmark --epochs 10 "${@:4}" --checkpoint_dir "$out/checkpoints")

# In an order in which kd's and dkd's runs find the teacher's logits that the first of them left there.
printf '%s\n' kd_0.7 student mse_{0.7,per_epoch,per_iteration,first_epoch} kd_{per_epoch,per_iteration,first_epoch} \
    dkd_{0.7,per_epoch,per_iteration,first_epoch} | xargs -L 1 -P "${PROCESSES:-2}" \
    python reproduce.py --suite schedules "${common[@]}" --results_dir "$out/results" --jobs
# mse by other constants.
printf '%s\n' 0.5 0.3 | xargs -L 1 -P "${PROCESSES:-2}" \
    python train_distillation.py --loss mse "${common[@]}" --results_dir "$out/constants" --resume --alpha
