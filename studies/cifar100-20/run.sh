#!/usr/bin/env bash
# The runs of this study, in order; what is finished is skipped, what was interrupted goes on.
#
#   studies/cifar100-20/run.sh CIFAR100 WEIGHTS OUT
#
# CIFAR100: a folder with CIFAR-100 as PNGs, train/<class>/* and test/<class>/*. WEIGHTS: an ImageNet ResNet-50, a
# state_dict. OUT: where checkpoints and results go. About 25 minutes for the teacher and 15 for each student on two
# CPU cores with AVX512_BF16, and there are 32 of these.
set -euo pipefail
cifar=$(realpath "$1") weights=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/../.."

# Every fifth class of the hundred in alphabetical order: labels 0, 5, ... 95.
for part in train test; do
    mkdir -p "$out/images/$part"
    ls "$cifar/$part" | awk 'NR % 5 == 1' | while read -r class; do
        ln -sfn "$cifar/$part/$class" "$out/images/$part/$class"
    done
done

where=(--dataset folder --data_dir "$out/images" --checkpoint_dir "$out/checkpoints" --results_dir "$out/results")
python train.py --model_job teacher --epochs 5 --scheduler_step 2 --weights "$weights" "${where[@]}" --resume
jobs=(student distillation distillation_KMJ0 distillation_LDH{,5,6,9,10})
python reproduce.py --epochs 10 --jobs "${jobs[@]}" --seeds 0 1 2 "${where[@]}"
python reproduce.py --epochs 10 --jobs distillation_KMJ2 distillation_KMJ1 distillation_LDH2 distillation_LDH3 "${where[@]}"

# Other readings of LDH10.
for seed in 0 1; do
    for schedule in "first epoch" "each epoch" "first epoch, then 0.7"; do
        python train_distillation.py --model_job distillation_LDH10 --schedule "$schedule" --seed "$seed" \
            --name "LDH10_$(tr -cs 'a-z0-9.' _ <<<"$schedule" | sed 's/_$//')" \
            --epochs 10 --scheduler_step 4 "${where[@]}" --resume
    done
done
python -m report "$out/results" --claims
