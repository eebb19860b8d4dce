"""The flags that scripts share, each declared once, and the way a script ends."""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import data
from jobs import Setup
from recipes import Recipe
from util import files, processes, runtime
from util.processes import Lost
from util.runtime import Diverged, Stopped, UserError, say


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message}")
        self.exit(2)


def number(kind: type, text: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number of that kind for which `allowed` is true; `text` says which these are."""

    def parse(value: str):
        try:
            parsed = kind(value)
        except ValueError:
            parsed = math.nan
        if not math.isfinite(parsed) or not allowed(parsed):
            raise argparse.ArgumentTypeError(f"{value} is not {text}")
        return parsed

    return parse


count = number(int, "a whole number of at least 1", lambda x: x >= 1)
epoch_count = number(int, "a whole number from 1 to 100000", lambda x: 1 <= x <= 100_000)
seed_number = number(int, "a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
positive = number(float, "a finite number above 0", lambda x: x > 0)
weight = number(float, "a finite number of at least 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def add_data_flags(parser: Parser) -> None:
    """Flags of every script: what is read, where it is written, what it runs on."""
    group = parser.add_argument_group("data and files")
    group.add_argument("--dataset", choices=data.DATASETS, default="cifar100", help="default: cifar100")
    group.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are; default: ./data")
    group.add_argument(
        "--image_size", type=count, help="side that images are resized to (folder: 32, tiny_imagenet: 64)"
    )
    group.add_argument(
        "--stream", action="store_true",
        help="decode image files as they are needed; chosen by itself where they would not fit the memory",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint_dir", type=Path, help="default: ./checkpoints for cifar100, ./checkpoints/<dataset> else"
    )
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of training; auto: bf16 where the hardware computes in it. A test is fp32 unless told bf16",
    )


def add_results_flag(parser: Parser) -> None:
    """The flag of the scripts that train."""
    parser.add_argument("--results_dir", type=Path, help="default: ./results for cifar100, ./results/<dataset> else")


def add_training_flags(parser: Parser) -> None:
    """Flags that override a recipe's row for one run, and the seed."""
    group = parser.add_argument_group("training; without a flag the job's own row of recipes.py holds")
    group.add_argument("--epochs", type=epoch_count)
    group.add_argument("--learning_rate", type=positive)
    group.add_argument("--batch_size", type=count)
    group.add_argument("--scheduler_step", type=count, help="learning rate x0.1 every so many epochs")
    group.add_argument("--seed", type=seed_number, default=0, help="of the weights and the data's order; default: 0")
    group.add_argument("--augment", action="store_true", help="random crop with padding 4, and horizontal flip")
    add_compile_flag(group)
    add_sync_bn_flag(group)
    add_resume_flags(parser)


def add_resume_flags(parser: Parser) -> None:
    """What to do with the state of a run that was not finished."""
    group = parser.add_argument_group("a run that was not finished").add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run where it stopped, or start it")
    group.add_argument("--overwrite", action="store_true", help="start over where a run was not finished")


def _mode(args: argparse.Namespace) -> str:
    """What the flags of add_resume_flags ask for, as jobs.Setup has it; restarted by torchrun, a run goes on."""
    return "resume" if args.resume or processes.restarted() else "overwrite" if args.overwrite else "new"


def add_compile_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile the network that is trained; auto (default): where it was measured to pay for itself",
    )  # fmt: skip


def add_sync_bn_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--sync_bn", choices=["on", "off"], default="on",
        help="under torchrun on CUDA, batch norm over all parts of a batch (default), or over each process's own",
    )  # fmt: skip


def add_teacher_cache_flag(parser: Parser) -> None:
    """The flag of the scripts that distil."""
    parser.add_argument(
        "--teacher_cache", choices=["auto", "off"], default="auto",
        help="auto (default): compute the teacher's outputs once and keep them; off: run it at every step",
    )  # fmt: skip


def override(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the flags that were given in place of its own values.

    Raises UserError for a flag that would have no effect in this row.
    """
    names = ("epochs", "learning_rate", "batch_size", "scheduler_step", "alpha", "T", "beta", "gamma")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "alpha" in given and isinstance(recipe.alpha, str):
        raise UserError(f"--alpha: the alpha of {recipe.job} is scheduled ({recipe.alpha}); leave the flag away")
    if "T" in given and recipe.T is None:
        raise UserError(f"--T: the loss of {recipe.job} has no temperature; leave the flag away")
    for name in ("beta", "gamma"):
        if name in given and recipe.network != "feature_student":
            raise UserError(f"--{name}: {recipe.job} has no projector for a feature loss; use one of the LDH jobs")
    if schedule := getattr(args, "schedule", None):
        if "alpha" in given:
            raise UserError("--alpha and --schedule: give one of the two")
        given["alpha"] = schedule
    return replace(recipe, **given)


def checkpoint_dir(args: argparse.Namespace) -> Path:
    """The folder of the checkpoints, as given or by the data set."""
    return args.checkpoint_dir or _default_dir("checkpoints", args.dataset)


def results_dir(args: argparse.Namespace) -> Path:
    """The folder of the results, as given or by the data set."""
    return args.results_dir or _default_dir("results", args.dataset)


def _default_dir(name: str, dataset: str) -> Path:
    return Path(name) if dataset == "cifar100" else Path(name, dataset)


def load_data(args: argparse.Namespace, hardware: runtime.Runtime) -> data.Dataset:
    """The data set that the flags ask for; one process of a machine fetches and decodes it. Raises UserError."""
    with hardware.processes.first_on_its_machine():
        return data.load(args.dataset, args.data_dir, args.image_size, args.stream)


def setup(args: argparse.Namespace, images: data.Dataset, hardware: runtime.Runtime, **choices) -> Setup:
    """What a job runs in; finds out before any training whether it can write what it will make. Raises UserError."""
    files.ensure_writable(checkpoint_dir(args), "--checkpoint_dir")
    files.ensure_writable(results_dir(args), "--results_dir")
    choices |= {"compile_mode": args.compile, "sync_bn": args.sync_bn == "on"}
    return Setup(images, hardware, checkpoint_dir(args), results_dir(args), **choices)


def training_setup(args: argparse.Namespace, images: data.Dataset, hardware: runtime.Runtime, **choices) -> Setup:
    """`setup` with the choices of add_training_flags."""
    return setup(args, images, hardware, seed=args.seed, augment=args.augment, mode=_mode(args), **choices)


def run(main: Callable[[], None], go_on: list[str] | None = None) -> NoReturn:
    """Run a script's main function and exit: 0, or with one line on stderr 2 (user's mistake), 1 (failed), 130.

    Stopped by a signal with its state saved, a script exits with 130 for SIGINT, 143 for SIGTERM and, so that a batch
    system puts the job into its queue again, 0 for SIGUSR1. go_on: the flags with which the same command goes on.
    """
    code = 0
    name = Path(sys.argv[0]).name
    try:
        main()
        processes.leave()
    except UserError as error:
        code = 2
        say(f"{name}: error: {error}")
    except Diverged as error:
        code = 1
        say(f"{name}: error: {error}; no checkpoint was written")
    except Lost as error:
        code = 1
        say(f"{name}: error: another process of this run is gone ({error}); its state is kept")
    except Stopped as error:
        # By name, as Python has no such signal on Windows.
        code = 0 if signal.Signals(error.number).name == "SIGUSR1" else 128 + error.number
        command = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")] + (go_on or [])
        say(f"\n{name}: interrupted; go on with: python {shlex.join(command)}")
    except KeyboardInterrupt:
        code = 130
        say(f"\n{name}: interrupted; no checkpoint was written")
    sys.exit(code)
