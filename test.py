"""Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.

python test.py --model_job teacher
python test.py --model_job dkd_per_epoch        # a run with a name of its own
python test.py --model_job student --checkpoint my_resnet18.pth
"""

import cli
import jobs
from recipes import RECIPES
from util import runtime


def main(choices: tuple[str, ...] = tuple(RECIPES)) -> None:
    parser = cli.Parser(description="Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.")
    cli.add_trained_flags(parser, choices)
    cli.add_data_flags(parser)
    args = parser.parse_args()

    chosen = runtime.choose(args.device, "fp32" if args.precision == "auto" else args.precision)
    recipe, path, trained = cli.trained(args, choices)
    trained = cli.with_statistics(args, recipe, trained)
    dataset = cli.load_data(args, chosen, trained.about)
    jobs.check_fit(trained, dataset, path)
    jobs.test(jobs.settled(trained, dataset, chosen, path), dataset, chosen)


if __name__ == "__main__":
    cli.run(main)
