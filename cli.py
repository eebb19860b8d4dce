"""The flags that scripts share, each declared once, and the way a script ends."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import data
import files
import runtime
from jobs import Setup
from recipes import Recipe
from runtime import Diverged, UserError


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
seed_number = number(int, "a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
positive = number(float, "a number above 0", lambda x: x > 0)
weight = number(float, "a number of at least 0", lambda x: x >= 0)
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
    group.add_argument("--epochs", type=count)
    group.add_argument("--learning_rate", type=positive)
    group.add_argument("--batch_size", type=count)
    group.add_argument("--scheduler_step", type=count, help="learning rate x0.1 every so many epochs")
    group.add_argument("--seed", type=seed_number, default=0, help="of the weights and the data's order; default: 0")
    group.add_argument("--augment", action="store_true", help="random crop with padding 4, and horizontal flip")
    add_compile_flag(group)


def add_compile_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile the network that is trained; auto (default): where it was measured to pay for itself",
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
        if given.get(name) and recipe.network != "feature_student":
            raise UserError(f"--{name}: {recipe.job} has no projector for a feature loss; use one of the LDH jobs")
    return replace(recipe, **given)


def checkpoint_dir(args: argparse.Namespace) -> Path:
    """The folder of the checkpoints, as given or by the data set."""
    return args.checkpoint_dir or _default_dir("checkpoints", args.dataset)


def results_dir(args: argparse.Namespace) -> Path:
    """The folder of the results, as given or by the data set."""
    return args.results_dir or _default_dir("results", args.dataset)


def _default_dir(name: str, dataset: str) -> Path:
    return Path(name) if dataset == "cifar100" else Path(name, dataset)


def setup(args: argparse.Namespace, images: data.Dataset, hardware: runtime.Runtime, **choices) -> Setup:
    """What a job runs in; finds out before any training whether it can write what it will make. Raises UserError."""
    files.ensure_writable(checkpoint_dir(args), "--checkpoint_dir")
    files.ensure_writable(results_dir(args), "--results_dir")
    return Setup(images, hardware, checkpoint_dir(args), results_dir(args), **choices)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function and exit: 0, or with one line on stderr 2 (user's mistake), 1 (failed), 130."""
    code = 0
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        code = 2
        print(f"{name}: error: {error}", file=sys.stderr)
    except Diverged as error:
        code = 1
        print(f"{name}: error: {error}; no checkpoint was written", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print(f"\n{name}: interrupted; no checkpoint was written", file=sys.stderr)
    sys.exit(code)
