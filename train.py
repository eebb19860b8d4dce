"""Train the teacher or the student on hard labels.

    python train.py --model_job teacher
    python train.py --model_job student --epochs 50 --learning_rate 0.001 --batch_size 256 --scheduler_step 20
    python train.py --model_job student --training strong

Writes <checkpoint_dir>/resnet50.pth or resnet18.pth, with another --training than the reference's
<job>_<training>.pth, and the figures into <results_dir>.
"""

import cli
import jobs
from recipes import RECIPES
from util import runtime


def main() -> None:
    parser = cli.Parser(description="Train the teacher or the student on hard labels.")
    parser.add_argument("--model_job", required=True, choices=[j for j, row in RECIPES.items() if not row.distils])
    cli.add_weights_flag(parser, "imagenet for the teacher where there are any, none for the student")
    cli.add_network_flags(parser)
    cli.add_training_flags(parser)
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()

    cli.refuse_idle_key(args)
    recipe = cli.override(cli.with_networks(RECIPES[args.model_job], args), args)
    chosen = runtime.choose(args.device, args.precision)
    dataset = cli.load_data(args, chosen)
    jobs.train(recipe, cli.training_setup(args, dataset, chosen, weights=args.weights))


if __name__ == "__main__":
    cli.run(main, go_on="--resume")
