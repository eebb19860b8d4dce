"""Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.

Example: python test.py --model_job teacher
"""

import cli
import jobs
from recipes import RECIPES
from util import runtime


def main(choices: tuple[str, ...] = tuple(RECIPES)) -> None:
    parser = cli.Parser(description="Test a job's checkpoint: top-1, top-5 and Test Loss on the test images.")
    parser.add_argument("--model_job", required=True, choices=choices)
    cli.add_data_flags(parser)
    args = parser.parse_args()

    hardware = runtime.choose(args.device, "fp32" if args.precision == "auto" else args.precision)
    images = cli.load_data(args, hardware)
    jobs.test(jobs.load_network(args.model_job, cli.checkpoint_dir(args), images), images, hardware)


if __name__ == "__main__":
    cli.run(main)
