"""Distil the teacher into the student: by a row of recipes.py, or by any loss and any schedule of alpha.

    python train_distillation.py --alpha 0.7 --T 2 --epochs 50
    python train_distillation.py --model_job distillation_LDH6
    python train_distillation.py --loss dkd --schedule "per epoch"
    python train_distillation.py --loss dkd --training benchmark

Writes <checkpoint_dir>/<the recipe's checkpoint>.pth, and the figures into <results_dir>.
"""

import cli
import jobs
from recipes import RECIPES
from util import runtime


def main() -> None:
    parser = cli.Parser(description="Distil the teacher into the student by one recipe.")
    parser.add_argument(
        "--model_job", choices=[j for j, row in RECIPES.items() if row.distils], help="default: distillation"
    )
    parser.add_argument(
        "--teacher",
        type=cli.path,
        help="its checkpoint; default: that of the job teacher, of this --training, in <checkpoint_dir>",
    )
    cli.add_teacher_cache_flag(parser)
    cli.add_weights_flag(parser, "none")
    cli.add_network_flags(parser)
    cli.add_teacher_statistics_flags(parser)
    cli.add_loss_flags(parser)
    cli.add_training_flags(parser)
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()

    path = args.teacher or cli.teacher_path(args)
    teacher = cli.teacher_recipe(args, path)
    recipe = cli.distilled(args, teacher)
    chosen = runtime.choose(args.device, args.precision)
    dataset = cli.load_data(args, chosen)
    trained = jobs.load(teacher, path, args.dataset, args.stem, dataset.image_size, args.weights_key)
    cli.refuse_idle_key(args, trained)
    trained = trained._replace(given=cli.normalisation(args))
    jobs.check_fit(trained, dataset, path)
    setup = cli.training_setup(args, dataset, chosen, weights=args.weights)
    jobs.train(recipe, setup, jobs.make_teacher(trained, path, setup, args.teacher_cache == "auto", [recipe]))


if __name__ == "__main__":
    cli.run(main, go_on="--resume")
