"""Every row in order: teacher, student, the eleven distilled students; then the table and the plots.

    python reproduce.py --dataset digits --weights none --epochs 3
    python reproduce.py --seeds 0 1 2
    python reproduce.py --training strong
    python reproduce.py --suite benchmark --teacher resnet56.pth --seeds 0 1 2

What is finished is skipped: run it again to go on where it stopped. Writes checkpoints, one JSON a run into
<results_dir>, and RESULTS.md, results.csv, top1.png and curves.png beside them; of a suite SUITE.md, a plot of accuracy
against cost or, where a loss has several schedules, a map of losses by schedules. The teacher is trained once, with
seed 0, unless one is given, and all students of all seeds are distilled from it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import cli
import jobs
import losses
import report
from jobs import Setup
from recipes import EPOCHS, RECIPES, Recipe, under
from report.results import NAMES, Result
from teacher import Teacher
from util import runtime
from util.bounds import COUNT, POSITIVE
from util.runtime import Diverged, Unsuited, UserError, say
from zoo import suites
from zoo.suites import SUITES, Suite

FULL_EPOCHS, FULL_STEP = RECIPES["student"].epochs, RECIPES["student"].scheduler_step


def main() -> None:
    args = parse()
    cli.refuse_idle(args)
    report.require()
    path = args.teacher or cli.teacher_path(args)
    teacher = cli.teacher_recipe(args, path) if args.teacher else cli.chosen_teacher(args)
    rows = suite_runs(args, teacher) if args.suite else chosen_rows(args, teacher)
    distilled = [recipe for recipe in rows if recipe.distils]
    needless = args.teacher or (args.suite and (path.exists() or not distilled))
    trained_here = None if needless else teacher_row(args, teacher)
    chosen = runtime.choose(args.device, args.precision)
    dataset = cli.load_data(args, chosen)
    setup = cli.setup(args, dataset, chosen, weights=args.weights, mode="resume", overwrites=False)
    before, done = stamps(setup), False
    try:
        if trained_here:
            run_once(trained_here, replace(setup, augment=args.teacher_augment), None)
        # Before the student's row, so that a teacher that can't be loaded is told of before hours of training.
        loaded = load_teacher(teacher, path, setup, args, distilled) if distilled else None
        diverged = run_rows([row for row in rows if suits(row, setup, args, loaded)], setup, args, loaded)
        done = True
    finally:
        if chosen.processes.main and (done or stamps(setup) != before):
            for path in report.try_write(setup.results_dir):
                say(f"wrote {path}")
    chosen.processes.barrier()  # one that ends with an error ends all
    if diverged:
        raise Diverged(f"training diverged: {'; '.join(diverged)}")


def stamps(setup: Setup) -> dict[Path, int]:
    """When each result in the folder was written: others where a run has ended since."""
    return {path: path.stat().st_mtime_ns for path in setup.results_dir.glob(NAMES)}


def parse() -> argparse.Namespace:
    """The command line; what a suite settles by itself is filled in."""
    parser = cli.Parser(description="Train and test every row in order; write the table and the plots.")
    what = "; ".join(f"{name}: {suite.words}" for name, suite in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, help=f"in place of the rows, runs that make a table: {what}")
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="some of the rows, or of the suite's; default: all")
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
    parser.add_argument("--teacher_epochs", type=cli.number(EPOCHS), help="of the teacher, in place of its share")
    parser.add_argument("--learning_rate", type=cli.number(POSITIVE))
    parser.add_argument("--batch_size", type=cli.number(COUNT))
    cli.add_training_flag(parser)
    parser.set_defaults(training=None)
    parser.add_argument(
        "--teacher", type=cli.path,
        help="its checkpoint; default: that of the job teacher in <checkpoint_dir>, trained here first",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=cli.weights, default="auto",
        help="the teacher's start: imagenet (default, where there are any), none, or a FILE",
    )  # fmt: skip
    cli.add_network_flags(parser)
    cli.add_teacher_statistics_flags(parser)
    parser.add_argument("--augment", action="store_true", help="train the students with random crop and flip")
    parser.add_argument("--teacher_augment", action="store_true", help="train the teacher with random crop and flip")
    cli.add_val_flag(parser)
    cli.add_teacher_cache_flag(parser)
    cli.add_speed_flags(parser)
    cli.add_sync_bn_flag(parser)
    cli.add_tensorboard_flag(parser)
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()
    known = SUITES[args.suite].runs if args.suite else RECIPES
    for job in args.jobs or []:
        if job not in known:
            parser.error(f"--jobs: there is no {job}; there are {', '.join(known)}")
    if args.teacher and "teacher" in (args.jobs or []):
        parser.error("--teacher and --jobs teacher: it is there, or it is trained here; give one of the two")
    if args.teacher:
        refuse_teachers_training(args, parser)
    if args.suite:
        settle(args, SUITES[args.suite], parser)
    args.training = args.training or "reference"
    return args


def refuse_teachers_training(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Refuse flags of the teacher's training where the teacher is given, and a file that is not there."""
    given = {"teacher_epochs": args.teacher_epochs, "teacher_augment": args.teacher_augment}
    given["weights"] = args.weights != "auto"
    for name in filter(given.get, given):
        parser.error(f"--{name}: with --teacher no teacher is trained; leave the flag away")
    if not args.teacher.is_file():
        parser.error(f"--teacher: there is no file {args.teacher}; give another one")


def settle(args: argparse.Namespace, suite: Suite, parser: cli.Parser) -> None:
    """Fill in the flags that the suite has values of its own for, which must not be given as well."""
    for flag, own in (("teacher_arch", suite.teacher), ("student_arch", suite.student), ("training", suite.training)):
        if own and getattr(args, flag):
            parser.error(f"--{flag}: the suite {args.suite} has its own ({own}); leave it away, or take another suite")
        if own:
            setattr(args, flag, own)


def teacher_row(args: argparse.Namespace, teacher: Recipe) -> Recipe | None:
    """The recipe of the teacher that is to be trained before all others; None where it is not asked for."""
    if args.suite:
        teacher = suites.teacher_of(teacher, args.suite, suite_label(args, teacher))
    elif "teacher" not in (args.jobs or RECIPES):
        return None
    row = scaled(teacher, args)
    return replace(row, epochs=args.teacher_epochs or row.epochs)


def chosen_rows(args: argparse.Namespace, teacher: Recipe) -> list[Recipe]:
    """The students' rows in order, as the flags ask for them."""
    rows = [RECIPES[job] for job in RECIPES if job != "teacher" and job in (args.jobs or RECIPES)]
    return [as_asked(row, args, teacher) for row in rows]


def suite_runs(args: argparse.Namespace, teacher: Recipe) -> list[Recipe]:
    """The suite's runs in order, as the flags ask for them.

    What can't be trained so is left out, and said to be. Raises Unsuited where it was asked for by name.
    """
    label, runs = suite_label(args, teacher), SUITES[args.suite].runs
    found = []
    for name in runs:
        if name not in (args.jobs or runs):
            continue
        recipe = suites.run_of(as_asked(runs[name], args, teacher), args.suite, name, label)
        try:
            losses.settings_of(recipe)
        except Unsuited as error:
            if args.jobs:
                raise
            say(f"left out: {error}")
        else:
            found.append(recipe)
    return found


def suite_label(args: argparse.Namespace, teacher: Recipe) -> str:
    """What the suite's results are told by, with these flags."""
    student = cli.of_arch(RECIPES["student"], args.student_arch)
    return suites.label(args.suite, (teacher.arch, student.arch), args.training)


def as_asked(recipe: Recipe, args: argparse.Namespace, teacher: Recipe) -> Recipe:
    """A student's recipe with the networks, the training and the length that the flags ask for."""
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


def load_teacher(
    recipe: Recipe, path: Path, setup: Setup, args: argparse.Namespace, distilled: list[Recipe]
) -> Teacher:
    """The teacher in the file, trained here or put there, for the recipes to be distilled."""
    trained = jobs.load(recipe, path, setup.dataset.name, setup.stem, setup.dataset.image_size, setup.weights_key)
    trained = trained._replace(given=cli.normalisation(args))
    return jobs.make_teacher(trained, path, setup, args.teacher_cache == "auto", distilled)


def suits(recipe: Recipe, setup: Setup, args: argparse.Namespace, teacher: Teacher | None) -> bool:
    """Whether the recipe's loss can be had of its networks; one that can't is told of.

    Raises Unsuited where it was asked for by name.
    """
    try:
        if recipe.distils:
            jobs.refuse_unsuited(recipe, setup, teacher)
    except Unsuited as error:
        if args.jobs:
            raise
        say(f"left out: {recipe.job}: {error}")
        return False
    return True


def run_rows(rows: list[Recipe], setup: Setup, args: argparse.Namespace, teacher: Teacher | None) -> list[str]:
    """Run what is not finished, row by row and seed by seed; a suite seed by seed, for whole tables early on.

    Return the runs of a suite that diverged; it goes on after them.
    """
    runs, diverged = [(recipe, seed) for recipe in rows for seed in args.seeds], []
    if args.suite:
        runs.sort(key=lambda run: args.seeds.index(run[1]))
    for recipe, seed in runs:
        here = replace(setup, seed=seed, augment=args.augment, weights="auto")  # --weights is the teacher's
        try:
            run_once(recipe, here, teacher if recipe.distils else None)
        except Diverged as error:
            if not args.suite:
                raise
            say(f"{recipe.job}, seed {seed}: {error}")
            diverged.append(f"{recipe.job}, seed {seed}")
    return diverged


def run_once(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> None:
    """Train and test the recipe, or go on with it, unless its result and its checkpoint are there already.

    Raises UserError where what is there comes from other settings: a table must not mix them.
    """
    title, processes = f"{recipe.job}, seed {setup.seed}", setup.runtime.processes
    # Asked and answered by the main process for all: it is the one that changes what is on the disk.
    done = finished(recipe, setup, teacher) if processes.main else None
    if processes.broadcast(done is not None):
        say(f"{title}: finished already")
        if done:
            jobs.show(done, jobs.paths(recipe, setup), setup)
        return
    say(f"{title}: {recipe.epochs} epochs")
    jobs.train(recipe, setup, teacher)


def finished(recipe: Recipe, setup: Setup, teacher: Teacher | None) -> Result | None:
    """The result of the run, if it is finished and none was begun since. Raises UserError where another's work is."""
    left, there = jobs.on_disk(recipe, setup, jobs.identity(recipe, setup, teacher)), jobs.paths(recipe, setup)
    warm = there.state if left.state and left.state["identity"].get("warm_start") else None
    warm = there.result if left.result and left.result.warm_start else warm
    why = left.another
    if warm:
        why = f"{warm} is of no run of this row: it has a warm_start from another; {jobs.OTHER_FOLDERS}"
    if why and recipe.network == "teacher" and not recipe.suite:
        others = " ".join(job for job in RECIPES if job != "teacher")
        why += f"; to distil from the teacher that is there: --jobs {others}"
    if why:
        raise UserError(why)
    return left.result


if __name__ == "__main__":
    cli.run(main)
