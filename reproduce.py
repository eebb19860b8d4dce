"""Every row in order: teacher, student, the eleven distilled students; then the table and the plots.

    python reproduce.py --dataset digits --weights none --epochs 3
    python reproduce.py --seeds 0 1 2
    python reproduce.py --training strong

What is finished is skipped: run it again to go on where it stopped. Writes checkpoints, one JSON a run into
<results_dir>, and RESULTS.md, results.csv, top1.png and curves.png beside them. The teacher is trained once, with
seed 0, and all students of all seeds are distilled from it.
"""

import argparse
from dataclasses import replace

import cli
import jobs
import report
from jobs import Setup
from recipes import EPOCHS, RECIPES, Recipe, under
from teacher import Teacher
from util import runtime
from util.bounds import COUNT, POSITIVE
from util.runtime import UserError, say

FULL_EPOCHS, FULL_STEP = RECIPES["student"].epochs, RECIPES["student"].scheduler_step


def main() -> None:
    args = parse()
    cli.refuse_idle(args)
    report.require()
    chosen = runtime.choose(args.device, args.precision)
    dataset = cli.load_data(args, chosen)
    setup = cli.setup(args, dataset, chosen, weights=args.weights, mode="resume")
    try:
        run_rows([chosen_row(RECIPES[job], args) for job in RECIPES if job in args.jobs], setup, args)
    finally:
        if chosen.processes.main:
            for path in report.try_write(setup.results_dir):
                say(f"wrote {path}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Train and test every row in order; write the table and the plots.")
    parser.add_argument("--jobs", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="default: all thirteen")
    parser.add_argument("--seeds", nargs="+", type=cli.number(cli.SEED), default=[0], help="default: 0")
    parser.add_argument(
        "--epochs", type=cli.number(EPOCHS),
        help=f"of the rows of {FULL_EPOCHS} epochs; the others, and the scheduler's steps, in proportion. With another "
        "--training of all rows",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler_step",
        type=cli.number(COUNT),
        help=f"of the rows with a step of {FULL_STEP}; the teacher's in proportion",
    )
    parser.add_argument("--learning_rate", type=cli.number(POSITIVE))
    parser.add_argument("--batch_size", type=cli.number(COUNT))
    cli.add_training_flag(parser)
    parser.add_argument(
        "--weights", default="auto",
        help="the teacher's start: imagenet (default, where there are any), none, or a FILE",
    )  # fmt: skip
    cli.add_network_flags(parser)
    cli.add_teacher_statistics_flags(parser)
    parser.add_argument("--augment", action="store_true", help="train the students with random crop and flip")
    parser.add_argument(
        "--teacher_augment", action="store_true", help="train the teacher with random crop (padding 4) and flip"
    )
    cli.add_val_flag(parser)
    cli.add_teacher_cache_flag(parser)
    cli.add_compile_flag(parser)
    cli.add_sync_bn_flag(parser)
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    return parser.parse_args()


def chosen_row(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The row as the flags ask for it."""
    teacher = cli.of_arch(RECIPES["teacher"], args.teacher_arch)
    if recipe.network == "teacher":
        return scaled(teacher, args)
    return scaled(cli.of_arch(recipe, args.student_arch, teacher if recipe.distils else None), args)


def scaled(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe in the way of --training, its epochs and its scheduler's step shrunk or stretched as the flags ask."""
    given = {"learning_rate": args.learning_rate, "batch_size": args.batch_size}
    given = {name: value for name, value in given.items() if value}
    if args.training != "reference":
        trained = under(recipe, args.training)
        return replace(trained, epochs=args.epochs or trained.epochs, **given)
    ratio = args.epochs / FULL_EPOCHS if args.epochs else 1
    step_ratio = args.scheduler_step / FULL_STEP if args.scheduler_step else ratio
    return replace(
        recipe,
        epochs=max(1, round(recipe.epochs * ratio)),
        scheduler_step=max(1, round(recipe.scheduler_step * step_ratio)),
        **given,
    )


def run_rows(rows: list[Recipe], setup: Setup, args: argparse.Namespace) -> None:
    """Run what is not finished, row by row and seed by seed."""
    if rows[0].network == "teacher":
        run_once(rows[0], replace(setup, augment=args.teacher_augment), None)
        rows = rows[1:]
    # Before the student's row, so that a teacher that can't be loaded is told of before hours of training.
    distils = any(recipe.distils for recipe in rows)
    teacher = load_teacher(setup, args, rows) if distils else None
    for recipe in rows:
        for seed in args.seeds:
            here = replace(setup, seed=seed, augment=args.augment)
            run_once(recipe, here, teacher if recipe.distils else None)


def load_teacher(setup: Setup, args: argparse.Namespace, rows: list[Recipe]) -> Teacher:
    """The teacher of that training in the checkpoint folder, trained here or put there."""
    recipe = under(cli.of_arch(RECIPES["teacher"], args.teacher_arch), args.training)
    path = jobs.checkpoint_path(recipe, setup.checkpoint_dir)
    trained = jobs.load(recipe, path, setup.dataset.name, setup.stem, setup.dataset.image_size)
    trained = trained._replace(given=cli.normalisation(args))
    return jobs.make_teacher(trained, path, setup, args.teacher_cache == "auto", rows)


def run_once(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> None:
    """Train and test the recipe, or go on with it, unless its result and its checkpoint are there already.

    Raises UserError where what is there comes from other settings: a table must not mix them.
    """
    title, processes = f"{recipe.job}, seed {setup.seed}", setup.runtime.processes
    # Asked and answered by the main process for all: it is the one that changes what is on the disk.
    if processes.broadcast(processes.main and is_finished(recipe, setup, teacher)):
        say(f"{title}: finished already")
        return
    say(f"{title}: {recipe.epochs} epochs")
    jobs.train(recipe, setup, teacher)


def is_finished(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> bool:
    """Whether the run is finished, and none was begun since. Raises UserError where another run's work is there."""
    there = jobs.paths(recipe, setup)
    if there.state.exists():
        return False
    try:
        done = jobs.finished(recipe, setup, teacher)
        if done and done.warm_start:
            raise UserError(f"{there.result} is no run of its row: it has a warm_start from another; {jobs.ADVICE}")
        return done is not None
    except UserError as error:
        if recipe.network != "teacher":
            raise
        others = " ".join(job for job in RECIPES if job != "teacher")
        raise UserError(f"{error}; to distil from the teacher that is there: --jobs {others}") from None


if __name__ == "__main__":
    cli.run(main)
