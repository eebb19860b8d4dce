"""The flags that scripts share, each declared once, and the way a script ends."""

import argparse
import difflib
import functools
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import checkpoint
import data
import jobs
import losses
import models
from jobs import Setup
from recipes import RECIPES, TRAININGS, Recipe, under
from teacher import Normalisation
from util import files, processes, runtime, scalars
from util.bounds import IMAGE_SIDE, MEAN, STD, Bound
from util.processes import Lost, NotJoined
from util.runtime import Diverged, Runtime, Stopped, UserError, say
from util.text import printable
from zoo import library_models

SEED = Bound(int, "a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
BELOW_1 = Bound(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)

OWN_NETWORKS = {row: name for name, row in models.ROWS_OWN.items()}  # by the names that the field has for them

# What other projects call a flag, and what it is here.
OTHER_NAMES = {
    "lr": "learning_rate", "base_lr": "learning_rate", "bs": "batch_size", "batch": "batch_size",
    "train_batch_size": "batch_size", "n_epochs": "epochs", "num_epochs": "epochs", "step_size": "scheduler_step",
    "lr_step": "scheduler_step", "temperature": "T", "temp": "T", "tau": "T", "kd_T": "T", "gpu": "device",
    "gpus": "device", "data": "data_dir", "data_path": "data_dir", "root": "data_dir", "output_dir": "checkpoint_dir",
    "save_dir": "checkpoint_dir", "out": "checkpoint_dir", "model": "model_job", "job": "model_job",
    "img_size": "image_size", "imgsz": "image_size", "pretrained": "weights", "teacher_path": "teacher",
    "path_t": "teacher", "ckpt": "checkpoint", "val_split": "val_fraction", "fp16": "precision", "amp": "precision",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line, no abbreviations, and an answer to a flag that is nearly right."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        _say_error(f"{self.prog}: error: {' '.join(message.split())}")
        self.exit(2)

    def parse_args(self, *args, **options) -> argparse.Namespace:
        """The flags; an unknown one is an error that names the one that was probably meant."""
        known, others = self.parse_known_args(*args, **options)
        if others:
            self.error(f"there is no {others[0]} here{self._meant(others[0])}; --help lists the flags")
        return known

    def _meant(self, text: str) -> str:
        flags = {name for action in self._actions for name in action.option_strings}
        name = text.partition("=")[0].lstrip("-").replace("-", "_")
        right = next((flag for flag in (f"--{name}", f"--{OTHER_NAMES.get(name)}") if flag in flags), None)
        close = [right] if right else difflib.get_close_matches(f"--{name}", flags, 1)
        return f"; did you mean {close[0]}?" if close else ""


def number(bound: Bound) -> Callable[[str], float]:
    """An argparse type: a number within the bound."""

    def parse(text: str) -> float:
        try:
            return bound.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from None

    return parse


def path(text: str) -> Path:
    """An argparse type: a path, ~ being the home folder wherever the shell left it standing."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of nobody
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder") from None


def weights(text: str) -> str:
    """An argparse type, for --weights: "auto", "imagenet", "none", or a file."""
    return text if text in ("auto", "imagenet", "none") else str(path(text))


def run_name(text: str) -> str:
    """An argparse type: a name for a run's files, which is no job's."""
    if not re.fullmatch(r"[\w.+=,-]{1,100}", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text} is not a name of letters, digits and _ . + = , -")
    if any(text in (row.job, row.checkpoint) for row in RECIPES.values()):
        raise argparse.ArgumentTypeError(f"{text} is the name of a job; take another")
    return text


def add_data_flags(parser: Parser) -> None:
    """Flags of every script: what is read, where it is written, what it runs on."""
    group = parser.add_argument_group("data and files")
    add_checkpoint_dir_flags(group)
    group.add_argument(
        "--data_dir",
        type=path,
        default=Path("data"),
        help="where the images are; of csv and parquet a file, or its folder; default: ./data",
    )
    group.add_argument(
        "--image_size",
        type=number(IMAGE_SIDE),
        help="side that images are resized to (folder, csv, parquet: 32, tiny_imagenet: 64)",
    )
    group.add_argument(
        "--stream", action="store_true",
        help="decode image files as they are needed; chosen by itself where they would not fit the memory",
    )  # fmt: skip
    group.add_argument(
        "--skip_unreadable", action="store_true", help="leave out image files that can't be read, and say which"
    )
    group = parser.add_argument_group("hardware")
    add_device_flag(group)
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of training; auto: bf16 where the hardware computes in it. A test is fp32 unless told bf16",
    )


def add_checkpoint_dir_flags(group: argparse._ActionsContainer) -> None:
    """The flags that tell where checkpoints are."""
    group.add_argument("--dataset", choices=data.DATASETS, default="cifar100", help="default: cifar100")
    group.add_argument(
        "--checkpoint_dir", type=path, help="default: ./checkpoints for cifar100, ./checkpoints/<dataset> else"
    )


def add_device_flag(group: argparse._ActionsContainer) -> None:
    """The flag of every script that computes."""
    group.add_argument(
        "--device", type=runtime.device_name, default="auto",
        help="auto (default: the accelerator that torch finds, else the CPU), cpu, cuda, cuda:N, mps, xpu, or xpu:N",
    )  # fmt: skip


def add_results_flag(parser: Parser) -> None:
    """The flag of the scripts that write figures."""
    parser.add_argument("--results_dir", type=path, help="default: ./results for cifar100, ./results/<dataset> else")


def add_recipe_flags(group: argparse._ActionsContainer, names: list[str]) -> None:
    """For each field of a recipe a flag that overrides it."""
    for part in fields(Recipe):
        if part.name in names:
            group.add_argument(f"--{part.name}", type=number(part.metadata["bound"]), help=part.metadata["help"])


def add_network_flags(parser: Parser) -> None:
    """The flags that put other networks in the place of the rows' own."""
    group = parser.add_argument_group("networks; --list names them")
    group.add_argument("--teacher_arch", type=arch, metavar="NAME", help="default: resnet50, or what --teacher holds")
    group.add_argument("--student_arch", type=arch, metavar="NAME", help="default: resnet18")
    add_weights_key_flag(group)
    group.add_argument(
        "--stem", choices=["auto", *models.STEMS], default="auto",
        help="small: without early pooling, for small images; auto: small up to 64 pixels, where the network has one; "
        "transform_input: torchvision's setting of inception_v3 and googlenet with ImageNet's weights",
    )  # fmt: skip


def add_weights_flag(parser: Parser, default: str) -> None:
    """The flag of the scripts that train one network."""
    parser.add_argument(
        "--weights", type=weights, default="auto", metavar="FILE",
        help=f"what it starts from: imagenet, none, or a FILE (a state_dict); default: {default}",
    )  # fmt: skip


def add_weights_key_flag(group: argparse._ActionsContainer) -> None:
    """The flag of the scripts that read others' checkpoints."""
    group.add_argument(
        "--weights_key", metavar="NAME",
        help="the set of weights to take of several in a checkpoint that was not made here, as state_dict_ema",
    )  # fmt: skip


def add_teacher_statistics_flags(parser: Parser) -> None:
    """Flags of the scripts that run a teacher."""
    for name, words, bound in (("mean", "mean", MEAN), ("std", "standard deviation", STD)):
        parser.add_argument(
            f"--teacher_{name}", type=functools.partial(statistics, bound), metavar="R,G,B",
            help=f"the {words} by which the teacher's images are normalised, pixels taken as 0 to 1, or imagenet; "
            "default: its checkpoint's own, else the data set's",
        )  # fmt: skip


def statistics(bound: Bound, text: str) -> data.Statistics | str:
    """An argparse type: three numbers within the bound, one for each of red, green and blue, or "imagenet"."""
    parts = text.split(",")
    if text == "imagenet":
        return text
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text} is not three numbers like 0.485,0.456,0.406, nor imagenet")
    return tuple(number(bound)(part) for part in parts)


def normalisation(args: argparse.Namespace) -> Normalisation | None:
    """What --teacher_mean and --teacher_std say. Raises UserError for one without the other."""
    given = args.teacher_mean, args.teacher_std
    if given == (None, None):
        return None
    if None in given:
        raise UserError("--teacher_mean and --teacher_std belong together; give both")
    return tuple(own if value == "imagenet" else value for value, own in zip(given, data.IMAGENET, strict=True))


def teacher_path(args: argparse.Namespace) -> Path:
    """Where the teacher is, unless --teacher tells."""
    return jobs.checkpoint_path(chosen_teacher(args), checkpoint_dir(args))


def chosen_teacher(args: argparse.Namespace) -> Recipe:
    """The recipe of the teacher: its row with the network and by the training that the flags ask for."""
    return under(of_arch(RECIPES["teacher"], args.teacher_arch), vars(args).get("training", "reference"))


def arch(text: str) -> str:
    """An argparse type: a network's name."""
    known = models.names()
    if text not in known and not text.startswith("timm:"):
        raise argparse.ArgumentTypeError(str(library_models.unknown(text, known)))
    return text


def teacher_recipe(args: argparse.Namespace, path: Path) -> Recipe:
    """What the teacher in the file is: the network that was asked for, or else that which the file holds."""
    if args.teacher_arch is None and path.is_file():
        name = checkpoint.network_in(path, args.weights_key, "teacher")
        name = name and models.without_projector(name)
        if name not in (None, "teacher"):
            return of_arch(RECIPES["teacher"], OWN_NETWORKS.get(name, name))
    return chosen_teacher(args)


def with_networks(recipe: Recipe, args: argparse.Namespace, teacher: Recipe | None = None) -> Recipe:
    """The recipe with the networks that the flags ask for. teacher: the recipe of the one that it is distilled from.

    Raises UserError for a flag without effect.
    """
    if teacher is None:
        _ensure_one_network(recipe, args)
    names = (args.teacher_arch, args.student_arch, teacher and teacher.arch)
    if args.stem == "transform_input" and not any(name and library_models.transforms(name) for name in names):
        raise UserError("--stem transform_input: no network here has that; remove the flag")
    return of_arch(recipe, getattr(args, f"{_role(recipe)}_arch"), teacher)


def _role(recipe: Recipe) -> str:
    return "teacher" if recipe.network == "teacher" else "student"


def _ensure_one_network(recipe: Recipe, args: argparse.Namespace) -> None:
    """Refuse the other role's network beside a recipe that has none. Raises UserError."""
    other = "student" if _role(recipe) == "teacher" else "teacher"
    if getattr(args, f"{other}_arch"):
        raise UserError(f"--{other}_arch: {recipe.job} trains no {other}; leave the flag away")


def of_arch(recipe: Recipe, name: str | None, teacher: Recipe | None = None) -> Recipe:
    """The recipe with the network of that name, None for its own; networks that are not its own are told by its name.

    teacher: the recipe of the one that it is distilled from, whose classifier a loss may want the student to reuse.
    """
    own = OWN_NETWORKS[_role(recipe)]
    others = [teacher.arch] if teacher and teacher.arch else []
    named = renamed(recipe, others if name in (None, own) else [*others, name])
    if teacher and recipe.soft in losses.LOSSES and losses.LOSSES[recipe.soft].reuses:
        return replace(named, arch=f"{name or recipe.arch or own}+{teacher.arch or 'resnet50'}")
    if name not in (None, own):
        return replace(named, arch=name)
    # A feature student's projector is made for a ResNet-50's map; for another teacher's the loss makes one.
    return replace(named, arch=own) if others and recipe.network == "feature_student" else named


def renamed(recipe: Recipe, parts: list[str]) -> Recipe:
    """The recipe with the parts added to the names of its job and of its files."""
    if not parts:
        return recipe
    job = "_".join([recipe.job, *(re.sub(r"[^\w.]+", "_", part) for part in parts)])
    return replace(recipe, job=job, checkpoint=job, reference=None)


def add_loss_flags(parser: Parser) -> None:
    """Flags of the loss: its name, its weights, the schedule of alpha, and every setting that some loss has."""
    group = parser.add_argument_group("the loss: alpha CE + (1 - alpha) weight soft + beta MSE + gamma S2T")
    group.add_argument("--loss", choices=losses.LOSSES, help="the soft loss of a run that is no job's; see --list")
    group.add_argument("--list", action=List, help="list losses, schedules, networks and jobs, a line each")
    add_recipe_flags(group, ["alpha", "weight", "beta", "gamma"])
    group.add_argument(
        "--schedule",
        choices=["constant", *losses.ALPHA_SCHEDULES],
        metavar="NAME",
        help="of alpha, in place of the row's own; see --list",
    )
    for name, settings in _settings().items():
        alike: dict[str, list[str]] = {}  # the losses whose setting is the same, in words and default
        for loss, setting in settings.items():
            alike.setdefault(f"{setting.words}, {setting.default:g}", []).append(loss)
        words = "; ".join(f"{', '.join(names)}: {text}" for text, names in alike.items())
        group.add_argument(f"--{name}", type=number(next(iter(settings.values())).bound), help=words)


class List(argparse.Action):
    """The flag --list: prints, and ends the script."""

    def __init__(self, **options):
        super().__init__(nargs=0, **options)

    def __call__(self, parser: Parser, *_) -> NoReturn:
        for name, loss in losses.LOSSES.items():
            settings = ", ".join(f"--{key} {setting.default:g}" for key, setting in loss.settings.items())
            settings = ", ".join(filter(None, [settings, f"--weight {loss.weight:g}"]))
            needs = "its settings tell what" if callable(loss.needs) else ", ".join(loss.needs) or "its head"
            learns = "; learns parts of its own" * (loss.parts is not None)
            print(f"loss      {name:10} of the teacher: {needs}{learns}{f'; {settings}' if settings else ''}")
        for name in ("constant", *losses.ALPHA_SCHEDULES):
            print(f"schedule  {name}")
        for name, training in TRAININGS.items():
            own = f"{training.epochs} epochs" if training.epochs else "each job's own epochs"
            print(f"training  {name:10} {training.optimiser}, {training.schedule}, {own}")
        for name in models.names():
            print(f"network   {name}")
        print("network   timm:NAME, any of timm's classifiers where timm is installed")
        for row in RECIPES.values():
            print(f"job       {row.job:20} {row.network}, {row.epochs} epochs" + f", {row.soft}" * bool(row.soft))
        parser.exit()


def _settings() -> dict[str, dict[str, losses.Setting]]:
    """Of each setting's name the losses that have it."""
    found: dict[str, dict[str, losses.Setting]] = {}
    for loss, entry in losses.LOSSES.items():
        for name, setting in entry.settings.items():
            found.setdefault(name, {})[loss] = setting
    return found


def add_training_flags(parser: Parser) -> None:
    """Flags that override a recipe's row for one run, its name and its seed."""
    group = parser.add_argument_group("training; without a flag the job's own row of recipes.py holds")
    add_recipe_flags(group, ["epochs", "learning_rate", "batch_size", "scheduler_step"])
    add_training_flag(group)
    add_seed_flag(group)
    group.add_argument("--name", type=run_name, help="of this run's files, so that it stands beside the job's own run")
    group.add_argument(
        "--augment",
        action="store_true",
        help=f"horizontal flip, and random crop with padding 4; above {data.LARGE} pixels random resized crop",
    )
    add_val_flag(group)
    add_speed_flags(group)
    add_sync_bn_flag(group)
    add_tensorboard_flag(group)
    group = parser.add_argument_group("what an earlier run left").add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true",
        help="go on with an unfinished run, or with a finished one of fewer --epochs; else start it",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="start over, and replace what an earlier run left")


def add_training_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--training", choices=TRAININGS, default="reference",
        help="the reference's (default); benchmark: that of the field's tables for CIFAR-100; strong: for the best "
        "figures. With another than the reference's, files are named <job>_<training>",
    )  # fmt: skip


def refuse_idle(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that has no effect with the --training."""
    training = TRAININGS[args.training]
    schedules, augments = training.schedule != "step", training.augment
    for flag, idle, why in (
        ("scheduler_step", schedules, "has a schedule of its own"),
        ("augment", augments, "crops and flips by itself"),
        ("teacher_augment", augments, "crops and flips by itself"),
    ):
        if idle and getattr(args, flag, None):
            raise UserError(f"--{flag}: --training {args.training} {why}; leave the flag away")


def _mode(args: argparse.Namespace) -> str:
    """What --resume and --overwrite ask for, as jobs.Setup has it."""
    return "resume" if args.resume else "overwrite" if args.overwrite else "new"


def add_seed_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that make or test one run."""
    parser.add_argument(
        "--seed", type=number(SEED), default=0,
        help="of the weights and the data's order; default: 0. Checkpoints of others are in seed<k>/",
    )  # fmt: skip


def add_val_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--val_fraction", type=number(BELOW_1), default=0.0,
        help="hold out so much of each class's training images; their loss and top-1 come after every epoch",
    )  # fmt: skip


def add_speed_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of the scripts that train."""
    parser.add_argument("--compile", choices=["on", "off"], default="off", help="torch.compile what runs at every step")
    parser.add_argument(
        "--cuda_graphs", choices=["on", "off"], default="on",
        help="on CUDA, launch each step's kernels as a whole (default), or one by one",
    )  # fmt: skip


def add_sync_bn_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--sync_bn", choices=["on", "off"], default="on",
        help="under torchrun on CUDA, batch norm over all parts of a batch (default), or over each process's own",
    )  # fmt: skip


def add_tensorboard_flag(parser: argparse._ActionsContainer) -> None:
    """The flag of the scripts that train."""
    parser.add_argument(
        "--tensorboard", action="store_true",
        help="write every epoch's figures for TensorBoard, too, into <results_dir>/tensorboard/<run>",
    )  # fmt: skip


def add_teacher_cache_flag(parser: Parser) -> None:
    """The flag of the scripts that distil."""
    parser.add_argument(
        "--teacher_cache", choices=["auto", "off"], default="auto",
        help="auto (default): compute the teacher's outputs once and keep them; off: run it at every step",
    )  # fmt: skip


def distilled(args: argparse.Namespace, teacher: Recipe) -> Recipe:
    """The recipe that the flags of train_distillation.py ask for: a job's, or one with a loss and a name of its own.

    teacher: its recipe. Raises UserError as `override` does.
    """
    if args.loss is None:
        return override(with_networks(RECIPES[args.model_job or "distillation"], args, teacher), args)
    if args.model_job:
        raise UserError("--loss and --model_job: a job has its own loss; give one of the two")
    projects = losses.LOSSES[args.loss].projects or args.beta or args.gamma
    network = "feature_student" if projects else "student"
    plain, like = RECIPES["student"], RECIPES["distillation"]
    shape = {"network": network, "epochs": plain.epochs, "scheduler_step": plain.scheduler_step}
    named = f"--loss {args.loss}"
    recipe = Recipe(named, "", soft=args.loss, alpha=like.alpha, weight=None, **shape)
    recipe = override(with_networks(recipe, args, teacher), args)
    # The networks and the training have added to the name that is replaced.
    name = _name_of(recipe) + recipe.job.removeprefix(named)
    return replace(recipe, job=name, checkpoint=name)


def _name_of(recipe: Recipe) -> str:
    """A name for a run's files made from its loss: with another loss, alpha or setting it is another name."""
    weights = {"weight": recipe.weight, "beta": recipe.beta, "gamma": recipe.gamma}
    numbers = recipe.settings | {name: weight for name, weight in weights.items() if weight}
    parts = [recipe.soft, recipe.alpha if isinstance(recipe.alpha, str) else f"alpha{recipe.alpha:g}"]
    parts += [f"{name}{value:g}" for name, value in numbers.items()]
    return re.sub(r"[^\w.]+", "_", "_".join(parts))


def override(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe in the way of --training, with the flags that were given in place of its own values.

    Raises UserError for a flag that would have no effect in this row, or with that training.
    """
    refuse_idle(args)
    recipe = under(recipe, args.training)
    what = f"--loss {args.loss}" if getattr(args, "loss", None) else recipe.job
    names = [part.name for part in fields(Recipe) if "bound" in part.metadata]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for name in ("beta", "gamma"):
        if name in given and recipe.network != "feature_student":
            raise UserError(f"--{name}: {what} has no projector for a feature loss; use one of the LDH jobs, or --loss")
    given |= _alpha(recipe, what, given.pop("alpha", None), getattr(args, "schedule", None))
    settings = {name: getattr(args, name) for name in _settings() if getattr(args, name, None) is not None}
    recipe = replace(recipe, **given, settings={**recipe.settings, **settings})
    losses.settings_of(recipe)
    return recipe


def _alpha(recipe: Recipe, what: str, number: float | None, schedule: str | None) -> dict[str, Any]:
    """What --alpha and --schedule change of the recipe, which the user calls so.

    Raises UserError where they contradict each other or it.
    """
    scheduled = isinstance(recipe.alpha, str) if schedule is None else schedule != "constant"
    if number is not None and scheduled:
        way = schedule or recipe.alpha
        raise UserError(f"--alpha: the alpha of {what} is scheduled ({way}); leave it away, or --schedule constant")
    if schedule == "constant" and number is None and isinstance(recipe.alpha, str):
        raise UserError(f"--schedule constant: the alpha of {what} is no number; give --alpha as well")
    if number is not None:
        return {"alpha": number}
    return {"alpha": schedule} if schedule not in (None, "constant") else {}


def add_trained_flags(parser: Parser, choices: tuple[str, ...]) -> None:
    """Flags of the scripts that take a trained network: which."""
    parser.add_argument("--model_job", required=True, help=f"a name that a run was given, or {', '.join(choices)}")
    parser.add_argument("--checkpoint", type=path, help="its file; default: the job's own in <checkpoint_dir>")
    add_seed_flag(parser)
    add_network_flags(parser)
    add_teacher_statistics_flags(parser)


def trained(
    args: argparse.Namespace, choices: tuple[str, ...], beside_teacher: bool = False
) -> tuple[Recipe, Path, jobs.Trained]:
    """The run that add_trained_flags ask for, its checkpoint, and the network in it. Raises UserError.

    beside_teacher: a teacher is asked for as well, whether or not the run is distilled from it.
    """
    folder = checkpoint_dir(args)
    recipe = jobs.recipe_named(args.model_job, args.checkpoint or folder, choices, args.seed)
    if args.model_job not in choices:
        _ensure_network(recipe, args)
        if not beside_teacher or recipe.network == "teacher":
            _ensure_one_network(recipe, args)
    elif beside_teacher and not recipe.distils and recipe.network != "teacher":
        recipe = of_arch(recipe, args.student_arch)
    else:
        teacher = of_arch(RECIPES["teacher"], args.teacher_arch) if recipe.distils else None
        recipe = with_networks(recipe, args, teacher)
    file = args.checkpoint or jobs.checkpoint_path(recipe, folder, args.seed)
    if not getattr(args, f"{_role(recipe)}_arch") and file.is_file():
        holds = checkpoint.network_in(file, args.weights_key, recipe.network)
        if holds and models.canonical(holds) != models.canonical(recipe.built):
            say(f"{file} holds a {models.TITLES.get(models.canonical(holds), holds)} and is taken as that")
            recipe = replace(recipe, arch=holds)
    trained = jobs.load(recipe, file, args.dataset, args.stem, args.image_size, args.weights_key)
    if not beside_teacher:  # of which the flags may tell
        holds = (trained.about or {}).get("stem") or checkpoint.stem(trained.network.state_dict())
        if args.stem != "auto" and holds not in (None, args.stem):
            raise UserError(f"--stem {args.stem}: {file} has the {holds} one; remove the flag")
        if args.weights_key and trained.about:
            raise UserError(f"--weights_key: {file} was made here and holds one network; remove the flag")
    return recipe, file, trained


def _ensure_network(recipe: Recipe, args: argparse.Namespace) -> None:
    """Refuse another network than a run with a name of its own has, as its checkpoint says. Raises UserError."""
    role = _role(recipe)
    told, own = getattr(args, f"{role}_arch"), (recipe.arch or OWN_NETWORKS[role]).partition("+")[0]
    if told not in (None, own):
        raise UserError(f"--{role}_arch {told}: {recipe.job} is a {own}; leave the flag away")


def refuse_idle_key(args: argparse.Namespace, teacher: jobs.Trained | None = None) -> None:
    """Refuse --weights_key where no file of others is read. Raises UserError."""
    is_file = args.weights not in ("auto", "none", "imagenet")
    if args.weights_key and not is_file and (teacher is None or teacher.about):
        raise UserError("--weights_key: no file here holds several sets of weights; remove the flag")


def with_statistics(args: argparse.Namespace, recipe: Recipe, network: jobs.Trained) -> jobs.Trained:
    """The network, a teacher, with the normalisation that the flags tell. Raises UserError for another network."""
    given = normalisation(args)
    if given and recipe.network != "teacher":
        raise UserError(f"--teacher_mean: {recipe.job} is no teacher; leave the flag away")
    return network._replace(given=given)


def checkpoint_dir(args: argparse.Namespace) -> Path:
    """The folder of the checkpoints, as given or by the data set."""
    return args.checkpoint_dir or jobs.default_dir("checkpoints", args.dataset)


def results_dir(args: argparse.Namespace) -> Path:
    """The folder of the results, as given or by the data set."""
    return args.results_dir or jobs.default_dir("results", args.dataset)


def load_data(args: argparse.Namespace, chosen: Runtime, about: dict[str, Any] | None = None) -> data.Dataset:
    """The data set that the flags ask for; one process of a machine fetches and decodes it. Raises UserError.

    about: of the checkpoint that is to be tested: its image size is taken, and its classes number the labels.
    """
    size, known = args.image_size, {}
    if about:
        known = {"classes": tuple(about["classes"]), "mean": tuple(about["mean"]), "std": tuple(about["std"])}
        if size not in (None, about["image_size"]):
            trained = about["image_size"]
            raise UserError(f"--image_size {size}: the checkpoint was trained at {trained}; leave the flag away")
        if size is None and args.dataset in data.RESIZED:
            size = about["image_size"]
            say(f"images are scaled to {size}x{size} pixels, as the checkpoint was trained")
    with chosen.processes.first_on_its_machine():
        dataset = data.load(
            args.dataset, args.data_dir, size, args.stream, skip_unreadable=args.skip_unreadable, **known
        )
    if about and dataset.image_size != about["image_size"]:
        trained, side = about["image_size"], dataset.image_size
        raise UserError(f"the checkpoint was trained at {trained}x{trained} pixels, {args.dataset} has {side}x{side}")
    return dataset


def setup(args: argparse.Namespace, dataset: data.Dataset, chosen: Runtime, **choices) -> Setup:
    """What a job runs in; finds out before any training whether it can write what it will make. Raises UserError."""
    if args.tensorboard:
        scalars.require()
    files.ensure_writable(checkpoint_dir(args), "--checkpoint_dir")
    files.ensure_writable(results_dir(args), "--results_dir")
    if args.val_fraction:
        dataset = dataset.holding_out(args.val_fraction)
    switches = {name: getattr(args, name) == "on" for name in ("compile", "cuda_graphs", "sync_bn")}
    choices |= {**switches, "stem": args.stem, "tensorboard": args.tensorboard, "weights_key": args.weights_key}
    return Setup(dataset, chosen, checkpoint_dir(args), results_dir(args), **choices)


def training_setup(args: argparse.Namespace, dataset: data.Dataset, chosen: Runtime, **choices) -> Setup:
    """`setup` with the choices of add_training_flags."""
    return setup(
        args, dataset, chosen, seed=args.seed, name=args.name, augment=args.augment, mode=_mode(args), **choices
    )


def run(main: Callable[[], None], go_on: str = "") -> NoReturn:
    """Run a script's main function and exit: 0, or with one line on stderr 2 (user's mistake), 1 (failed), 130.

    Stopped by a signal with its state saved, a script exits with 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP and,
    so that a batch system puts the job into its queue again, 0 for SIGUSR1. go_on: the flag with which the same command
    goes on.
    """
    with runtime.lasting_output():
        code = _code(main, go_on)
    sys.exit(code)


def _code(main: Callable[[], None], go_on: str) -> int:
    """Run a script's main function, say how it ended, and give its exit code."""
    code, name = 0, Path(sys.argv[0]).name
    try:
        main()
        processes.leave()
    except UserError as error:
        code = 2
        _say_error(f"{name}: error: {error}", alone=isinstance(error.__cause__, NotJoined))
        processes.await_main()
    except (MemoryError, RuntimeError, OSError, Lost) as error:
        if runtime.is_out_of_memory(error) or runtime.is_out_of_memory(error.__cause__):
            code, line = 2, runtime.memory_line(error)
        elif isinstance(error, Lost):
            code, line = 1, f"another process of this run is gone ({error}); its state is kept"
        elif isinstance(error, OSError) and error.filename is not None:  # a file that is not as it should be
            code, line = 2, f"{printable(error.filename)}: {error.strerror}"
        else:
            raise
        _say_error(f"{name}: error: {line}")
        if code == 2:
            processes.await_main()
    except Diverged as error:
        code = 1
        _say_error(f"{name}: error: {error}; no checkpoint was written")
        processes.await_main()
    except Stopped as error:
        # By name, as Python has no such signal on Windows.
        code = 0 if signal.Signals(error.number).name == "SIGUSR1" else 128 + error.number
        command = sys.argv
        if error.path.exists():  # else no state is there yet, and what the flags ask for is still to do
            command = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")] + [go_on] * bool(go_on)
        say("")
        say(f"{name}: interrupted; go on with: python {shlex.join(command)}")
    except KeyboardInterrupt:
        code = 130
        say("")
        say(f"{name}: interrupted; no checkpoint was written")
    return code


def _say_error(line: str, alone: bool = False) -> None:
    """The line of the error that ends the run, from one of its processes; from each that stays alone."""
    if alone or processes.fails_first():
        runtime.say_alone(line)
