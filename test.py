"""Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.

python test.py --model_job teacher
python test.py --model_job dkd_per_epoch        # a run with a name of its own
python test.py --model_job student --checkpoint my_resnet18.pth
"""

import cli
import jobs
from recipes import RECIPES
from util import runtime
from util.runtime import UserError


def main(choices: tuple[str, ...] = tuple(RECIPES)) -> None:
    parser = cli.Parser(description="Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.")
    parser.add_argument("--model_job", required=True, help=f"a name that a run was given, or {', '.join(choices)}")
    parser.add_argument("--checkpoint", type=cli.path, help="its file; default: the job's own in <checkpoint_dir>")
    cli.add_seed_flag(parser)
    cli.add_network_flags(parser)
    cli.add_teacher_statistics_flags(parser)
    cli.add_data_flags(parser)
    args = parser.parse_args()

    recipe = jobs.recipe_named(args.model_job, args.checkpoint or cli.checkpoint_dir(args), choices, args.seed)
    teacher = cli.of_arch(RECIPES["teacher"], args.teacher_arch) if recipe.distils else None
    recipe = cli.with_networks(recipe, args, teacher)
    chosen = runtime.choose(args.device, "fp32" if args.precision == "auto" else args.precision)
    path = args.checkpoint or jobs.checkpoint_path(recipe, cli.checkpoint_dir(args), args.seed)
    trained = jobs.load(recipe, path, args.dataset, args.stem, args.image_size)
    if given := cli.normalisation(args):
        if recipe.network != "teacher":
            raise UserError(f"--teacher_mean: {recipe.job} is no teacher; leave the flag away")
        trained = trained._replace(given=given)
    dataset = cli.load_data(args, chosen, trained.about)
    jobs.check_fit(trained, dataset, path)
    jobs.test(trained, dataset, chosen)


if __name__ == "__main__":
    cli.run(main)
