"""Distil the teacher into the student by one recipe.

    python train_distillation.py --alpha 0.7 --T 2 --epochs 50
    python train_distillation.py --model_job distillation_LDH6

Writes <checkpoint_dir>/<the recipe's checkpoint>.pth and <results_dir>/<job>_seed<seed>.json.
"""

from pathlib import Path

import cli
import jobs
import losses
from recipes import RECIPES
from util import runtime


def main() -> None:
    parser = cli.Parser(description="Distil the teacher into the student by one recipe.")
    parser.add_argument(
        "--model_job", default="distillation", choices=[j for j, row in RECIPES.items() if row.distils],
        help="default: distillation",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Path, help="checkpoint to distil from; default: <checkpoint_dir>/resnet50.pth"
    )
    cli.add_teacher_cache_flag(parser)
    group = parser.add_argument_group("the loss: alpha CE + (1 - alpha) soft + beta MSE + gamma S2T")
    group.add_argument("--alpha", type=cli.fraction, help="weight of the hard labels, where it is not scheduled")
    group.add_argument("--schedule", choices=list(losses.ALPHA_SCHEDULES), help="of alpha, in place of the job's own")
    group.add_argument("--T", type=cli.positive, help="temperature of KD")
    group.add_argument("--beta", type=cli.weight, help="weight of the feature MSE (LDH jobs)")
    group.add_argument("--gamma", type=cli.weight, help="weight of student to teacher, S2T (LDH jobs)")
    cli.add_training_flags(parser)
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()

    recipe = cli.override(RECIPES[args.model_job], args)
    hardware = runtime.choose(args.device, args.precision)
    images = cli.load_data(args, hardware)
    path = args.teacher or cli.checkpoint_dir(args) / f"{RECIPES['teacher'].checkpoint}.pth"
    network = jobs.load_network("teacher", path.parent, images, path)
    setup = cli.training_setup(args, images, hardware)
    jobs.train(recipe, setup, jobs.make_teacher(network, path, setup, args.teacher_cache, [recipe]))


if __name__ == "__main__":
    cli.run(main, go_on=["--resume"])
