"""The result of a run, the one place where its fields are spelt, and all results of a folder."""

import base64
import csv
import io
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import numpy

from recipes import RECIPES, TRAININGS
from util import parsed
from util.files import ensure_regular, write_json
from util.runtime import UserError
from util.text import in_markdown, printable

NAMES = "*_seed*.json"

# The data on which the reference's figures were measured.
REFERENCE_DATA = {"train_images": 50000, "test_images": 10000, "classes": 100, "image_size": 32, "val_images": 0}


# Data sets in words; those of image files by their fingerprints, as of copies with the official file names.
TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "tiny_imagenet": "Tiny ImageNet"}
KNOWN = {
    "2121847cf1c0da7715cf4b2d71a7d5d9": "CIFAR-100",
    "a3eec0625bca327b82fddb2e6d85dcbe": "20 classes of CIFAR-100",
    "72476caa8bcd860cc6cf2927a7f82f20": "a quarter of CIFAR-100's training images",
}

# The rows whose recipe was chosen by figures of the test: of four readings of a line of text the nearest to its figure.
CHOSEN_BY_TEST = {"distillation_LDH10"}
MARK = "†"
CHOSEN_NOTE = f"{MARK} Its reading of the reference was chosen by test figures, among four."


class _Data(TypedDict):
    train_images: int
    test_images: int
    classes: int
    image_size: int


class Data(_Data, total=False):
    """What a run was trained and tested on; train_images: without those that were held out, val_images."""

    val_images: int
    fingerprint: str
    test_fingerprint: str


class _RecipeValues(TypedDict):
    network: str
    soft: str | None
    alpha: float | str
    beta: float
    gamma: float
    epochs: int
    learning_rate: float
    batch_size: int


class RecipeValues(_RecipeValues, total=False):
    """A recipe's plain values; besides these, the settings of its loss under their own names, like T.

    training: where it is not the reference's; then all that it is made of stands beside it.
    """

    scheduler_step: int
    training: str
    arch: str | None
    weight: float | None


class _Claimed(TypedDict):
    top1: float
    source: str
    epochs: int


class Claimed(_Claimed, total=False):
    """A paper's figure, after how many epochs it was measured, and whether at the best of them, see recipes.Claim."""

    best: bool


class _Epoch(TypedDict):
    epoch: int
    train_loss: float
    train_top1: float


class Epoch(_Epoch, total=False):
    """The figures of an epoch; besides these, each term of the loss under its own name.

    train_loss: the mean over images; train_loss_over_batches: over batches, as it is printed. val_loss (the mean CE)
    and val_top1: of held-out images.
    """

    train_loss_over_batches: float
    alpha: float
    learning_rate: float
    seconds: float
    val_loss: float
    val_top1: float


class _Stretch(TypedDict):
    from_epoch: int
    from_batch: int
    to_epoch: int
    to_batch: int


class Stretch(_Stretch, total=False):
    """What a part of a run was trained with, from so many epochs and batches of the next one, to so many.

    commit, changed: of the code, and whether it was changed since; None outside a git checkout. graphs: the steps were
    CUDA graphs. compiled: the network was. weights_sha256: of the file of weights that the network started from here.
    """

    commit: str | None
    changed: bool | None
    device: str
    versions: dict
    processes: int
    graphs: bool
    compiled: bool
    weights_sha256: str | None


class _Test(TypedDict):
    top1: float
    top5: float
    test_loss: float
    mean_ce: float


class Test(_Test, total=False):
    """The figures of the test. correct: base64 of numpy.packbits over the test images in order.

    order: "official" if test_loss is of the images in the order of CIFAR's official files.
    """

    images: int
    correct: str
    order: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is kept of a finished run: what it was, and the figures of its epochs and of its test.

    name: of the run's files; its job's, unless it was given one. teacher: {"sha256": ...} of the one it learnt from.
    warm_start: "epochs" and "checkpoint_sha256" of the finished run that it was trained on from.
    torchrun: the name of the one that started its processes, see util.processes.
    suite: the table that it belongs to, "" for the table of the folder. claimed: what a paper says of it.
    extra_parameters: that the loss learnt besides the student's. peak_memory: in bytes, see runtime.peak_memory; 0
    where it is not known. device, versions: those of the last stretch. stretches: all, in order; None in older results.
    """

    job: str
    name: str
    dataset: str
    data: Data
    seed: int
    augment: bool = False
    precision: str
    batch_norm: str = "whole batch"
    recipe: RecipeValues
    stem: str = "small"
    weights: str | None = None
    teacher: dict | None = None
    teacher_top1: float | None
    epochs: list[Epoch]
    test: Test
    seconds: float
    images_per_second: float
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    versions: dict
    device: str
    processes: int = 1
    command: str
    warm_start: dict | None = None
    torchrun: str = ""
    suite: str = ""
    claimed: Claimed | None = None
    extra_parameters: int = 0
    peak_memory: int = 0
    stretches: list[Stretch] | None = None

    @property
    def all_stretches(self) -> list[Stretch]:
        """The stretches of the run; of an older result one, with what the result tells."""
        told = {"device": self.device, "versions": self.versions, "processes": self.processes}
        return self.stretches or [
            {"from_epoch": 0, "from_batch": 0, "to_epoch": len(self.epochs), "to_batch": 0, **told}
        ]

    @classmethod
    def read(cls, path: Path) -> "Result":
        """The result in the file, checked, its text printable.

        Raises UserError where it can't be read, is damaged, is not whole, or tells what can't be.
        """
        try:
            ensure_regular(path)
            values = _mapped(parsed.loads(path.read_bytes()), printable)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValueError:
            raise UserError(
                f"{path} is damaged (cut short?), not JSON of finite numbers; delete it and run its job again"
            ) from None
        flaw = "the whole" if not isinstance(values, dict) else ""
        if not flaw:
            values.setdefault("name", values.get("job"))
            flaw = _first_flaw(values) or _impossible(values)
        if flaw:
            raise UserError(f"{path} is no whole result ({flaw} is missing or wrong); delete it and run its job again")
        values["data"].setdefault("val_images", 0)
        values["recipe"].setdefault("weight", 1.0)
        return cls(**{part.name: values[part.name] for part in fields(cls) if part.name in values})

    def in_markdown(self) -> "Result":
        """The same, its text escaped for Markdown, but for the command, which stands as code."""
        names = [part.name for part in fields(self) if part.name not in ("command", "epochs", "test")]
        return replace(self, **{name: _mapped(getattr(self, name), in_markdown) for name in names})

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises UserError."""
        write_json(asdict(self), path)

    @property
    def devices(self) -> str:
        """The devices that trained it, in order, in words; an older result tells the last one alone."""
        words, before = [], None
        for part in self.all_stretches:
            device = part.get("device", "one that is not recorded")
            if device != before:
                words.append(f"from epoch {part['from_epoch'] + 1} on {device}" if words else device)
            before = device
        return ", ".join(words)

    @property
    def machine(self) -> str:
        """The devices, and the precision."""
        return f"{self.devices}, {self.precision}"

    @property
    def commits(self) -> list[str]:
        """The commits of the code that trained it, as far as they are known, short, in words."""
        told = [part for part in self.all_stretches if part.get("commit")]
        return [part["commit"][:7] + " and changes" * bool(part.get("changed")) for part in told]

    @property
    def is_of_the_references_data(self) -> bool:
        """Whether it is of all the images that the reference's figures are of."""
        return self.dataset == "cifar100" and self.is_of_cifar100s_shape

    @property
    def is_of_cifar100s_shape(self) -> bool:
        """Whether it is of as many images, classes and pixels as CIFAR-100 has, under whatever name."""
        return all(self.data[name] == value for name, value in REFERENCE_DATA.items())

    @cached_property
    def right(self) -> numpy.ndarray | None:
        """Of each test image, in order, whether it was right, as booleans (test images,); None where that is untold."""
        return _unpacked(self.test["correct"], self.data["test_images"]) if "correct" in self.test else None


class Rows(dict[str, dict[int, Result]]):
    """Name -> seed -> result: the rows of recipes.py in its order, then runs with own names; seeds ascending."""

    def in_markdown(self) -> "Rows":
        """The same rows, their text escaped for Markdown."""
        return type(self)(
            {name: {seed: run.in_markdown() for seed, run in seeds.items()} for name, seeds in self.items()}
        )

    def runs(self) -> Iterator[Result]:
        """Every run, row by row."""
        return (run for seeds in self.values() for run in seeds.values())

    @property
    def any_run(self) -> Result:
        """A run, for what all have in common."""
        return next(self.runs())

    def first(self, name: str) -> Result:
        """A run of the row, for what all its seeds have in common."""
        return next(iter(self[name].values()))

    def top1(self, name: str) -> float:
        """The mean over seeds of a row's top-1, in percent."""
        return statistics.mean(run.test["top1"] for run in self[name].values())

    def is_teacher(self, name: str) -> bool:
        """Whether the row's network is the teacher's."""
        return self.first(name).recipe["network"] == "teacher"

    @property
    def students(self) -> list[str]:
        """The rows but the teachers'."""
        return [name for name in self if not self.is_teacher(name)]

    def kind(self, name: str) -> tuple[str, str]:
        """The network and the training of a student's row."""
        run = self.first(name)
        return self.network(run), training_of(run)

    @staticmethod
    def network(run: Result) -> str:
        """The network of a student's run."""
        # simkd's students are named with their teachers after a +.
        return (run.recipe.get("arch") or "resnet18").split("+")[0]

    def plain_students(self, kind: tuple[str, str]) -> list[str]:
        """The rows of the student of this kind on hard labels alone: its job's own, or else those with other names."""
        plain = [name for name in self.students if self.kind(name) == kind and _is_plain(self.first(name))]
        return [name for name in plain if name == self.first(name).job] or plain

    def student_of(self, kind: tuple[str, str], name: str | None = None) -> str | None:
        """The row of the student of this kind on hard labels alone; None where it did not run.

        Of several with other names that one which was trained as the row `name` was; None where there is no such.
        """
        found = self.plain_students(kind)
        if len(found) > 1:
            found = [one for one in found if name and not otherwise(self[one], self[name], SETUP | LENGTH)]
        return found[0] if found else None

    @property
    def kinds(self) -> dict[tuple[str, str], list[str]]:
        """The students' rows by their kinds."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in self.students:
            found.setdefault(self.kind(name), []).append(name)
        return found

    def of_no_suite(self) -> "Rows":
        """The rows that belong to the folder's own table."""
        return Rows({name: seeds for name, seeds in self.items() if not self.first(name).suite})

    @property
    def have_several_seeds(self) -> bool:
        """Whether any row has more than one seed."""
        return any(len(seeds) > 1 for seeds in self.values())

    @property
    def are_a_check(self) -> bool:
        """Whether these runs check the pipeline and show nothing else."""
        return self.any_run.dataset == "digits"


def _is_plain(run: Result) -> bool:
    recipe = run.recipe
    return not (recipe["soft"] or recipe["beta"] or recipe["gamma"])


def training_of(run: Result) -> str:
    """The way of training in words; the benchmark's had Nesterov's momentum before it had the authors' plain one."""
    training = run.recipe.get("training", "reference")
    return training + ", with Nesterov's momentum" * (training == "benchmark" and bool(run.recipe.get("nesterov")))


# What a run was trained with besides its recipe and its teacher. Runs that differ in it differ by more than their rows.
SETUP: dict[str, Callable[[Result], Any]] = {
    "training images": lambda run: run.data["train_images"],
    "augmentation": lambda run: run.augment,
    "precision": lambda run: run.precision,
    "batch norm": lambda run: run.batch_norm,
    "stem": lambda run: run.stem,
    "initial weights": lambda run: None if run.weights == "none" else run.weights,
}


LENGTH: dict[str, Callable[[Result], Any]] = {
    name: lambda run, name=name: run.recipe.get(name)
    for name in ("epochs", "learning_rate", "batch_size", "scheduler_step")
}


def otherwise(
    ours: dict[int, Result], theirs: dict[int, Result], ways: dict[str, Callable[[Result], Any]]
) -> list[str]:
    """What is not the same in all runs of two rows, in words: of `ways`, or the teacher of a seed that both have.

    A row that has no teacher has no other one.
    """
    runs = [*ours.values(), *theirs.values()]
    found = [what for what, told in ways.items() if len({*map(told, runs)}) > 1]
    pairs = [(ours[seed].teacher, theirs[seed].teacher) for seed in ours.keys() & theirs.keys()]
    known = ("sha256", "normalisation", "stem", "weights_key")  # an older result has the first alone
    return found + ["teacher"] * any(a and b and any(a.get(key) != b.get(key) for key in known) for a, b in pairs)


def read(results_dir: Path) -> Rows:
    """The runs in the folder, all whole and of the same data. Raises UserError, which names all damaged ones."""
    runs, flaws = {}, []
    there = [path for path in results_dir.glob(NAMES) if not path.name.startswith(".")]
    for path in sorted(path for path in there if not path.name.endswith("_card.json")):
        try:
            runs[path] = Result.read(path)
            _check_name(path, runs[path])
        except UserError as error:
            flaws.append(str(error))
    if flaws:
        raise UserError("; ".join(flaws))
    if not runs:
        raise UserError(f"{results_dir} holds no results ({NAMES.replace('*', '<...>')}); train something first")
    _check_same_data(runs)
    order = list(RECIPES)
    rows = Rows()
    for run in sorted(runs.values(), key=lambda run: (*_place(run, order), run.name, run.seed)):
        rows.setdefault(run.name, {})[run.seed] = run
    for name, seeds in rows.items():
        jobs = dict.fromkeys(run.job for run in seeds.values())
        if len(jobs) > 1:
            raise UserError(f"{name} is the name of runs of different jobs ({', '.join(jobs)}); move one of them away")
    return rows


def _place(run: Result, order: list[str]) -> tuple[bool, int, bool, bool]:
    """First the rows of recipes.py by their own names, then others by their jobs; teachers, then students alone."""
    place = order.index(run.job) if run.job in order else len(order)
    return run.name not in order, place, run.recipe["network"] != "teacher", bool(run.recipe["soft"])


def _check_name(path: Path, run: Result) -> None:
    if path.name != f"{run.name}_seed{run.seed}.json":
        raise UserError(f"{path} holds {run.name} with seed {run.seed}: not what its name says; move it away")
    if run.name in RECIPES and run.name != run.job:
        raise UserError(f"{path} is of the job {run.job}, not of the one that its name says; move it away")


def _check_same_data(runs: dict[Path, Result]) -> None:
    first, *others = runs
    for path in others:
        if difference := _other_data(runs[first], runs[path]):
            raise UserError(
                f"{first} and {path} are of different data ({difference}); a table must not mix them: keep each in a "
                "folder of its own"
            )


def _other_data(one: Result, other: Result) -> str:
    """In what two runs' data differ, in words: in number, or, where both tell them, in the images; "" in nothing."""
    if describe_data(one) != describe_data(other):
        return f"{describe_data(one)}; {describe_data(other)}"
    told = {name: (one.data.get(name), other.data.get(name)) for name in ("fingerprint", "test_fingerprint")}
    differ = [name for name, pair in told.items() if None not in pair and pair[0] != pair[1]]
    where = {"fingerprint": "training", "test_fingerprint": "test"}[differ[-1]] if differ else ""
    return f"as many, but other {where} images or labels" if differ else ""


def data_title(run: Result) -> str:
    """The data's name in words: what the images are, else the name of their folder, else how they were read."""
    known = TITLES.get(run.dataset) or KNOWN.get(run.data.get("fingerprint"))
    if known:
        return known
    folder = re.search(r"--data_dir[ =](?:'([^']+)'|(\S+))", run.command)
    name = Path(next(filter(None, folder.groups()))).name if folder else ""
    return re.sub(r"[^\w .-]", "", name).strip() or run.dataset  # nothing that Markdown or a terminal acts on


def marked(name: str) -> str:
    """The row's name, with a mark where its recipe was chosen by figures of the test."""
    return name + f" {MARK}" * (name in CHOSEN_BY_TEST)


def full_epochs(run: Result) -> int:
    """For how many epochs such a run is trained if it isn't shortened."""
    training = run.recipe.get("training", "reference")
    full = TRAININGS[training].epochs if training in TRAININGS else None
    return full or RECIPES.get(run.job, RECIPES["student"]).epochs


def epochs_of(run: Result) -> str:
    """How many epochs it was trained and, where it was shortened, of how many, in digits."""
    full = full_epochs(run)
    return f"{len(run.epochs)} of {full}" if len(run.epochs) < full else str(len(run.epochs))


def length(rows: Rows) -> str:
    """How long the students, or the teacher alone, were trained and how often, in words."""
    names = rows.students or list(rows)
    epochs = dict.fromkeys(epochs_of(run) for name in names for run in rows[name].values())
    least, most = min(len(rows[name]) for name in names), max(len(rows[name]) for name in names)
    several = f"{least} {'or' if most == least + 1 else 'to'} {most} seeds"
    seeds = several if least < most else f"{most} seed{'s' * (most > 1)}"
    return f"{' or '.join(sorted(epochs, key=lambda text: int(text.split()[0])))} epochs, {seeds}"


def describe_data(run: Result) -> str:
    """The run's data in words; images that it held out are training images all the same."""
    data = run.data
    return (
        f"{run.dataset}, {data['train_images'] + data['val_images']:,} training and {data['test_images']:,} test "
        f"images of {data['image_size']}x{data['image_size']} pixels, {data['classes']} classes"
    )


def made_on(runs: list[Result], told: Callable[[Result], str]) -> dict[str, list[str]]:
    """The lines of a heading that say what trained the runs. told: of a run, its devices in words."""
    older = any(run.stretches is None for run in runs)
    devices = dict.fromkeys(told(run) for run in runs)
    note = " (an older result tells only the device on which its run ended)" * older
    return {"Device": ["; ".join(devices) + note], "Code": [commit for run in runs for commit in run.commits]}


def made_by(runs: Iterable[Result]) -> str:
    """The commands that made the runs, each once; those that differ in their --jobs alone as one, with all jobs."""
    commands: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        parts = re.fullmatch(r"(.*? --jobs)((?: (?!-)\S+)+)(.*)", run.command)
        before, jobs, after = parts.groups() if parts else (run.command, "", "")
        commands.setdefault((before, after), {}).update(dict.fromkeys(jobs.split()))
    lines = [f"    python {' '.join([before, *jobs])}{after}" for (before, after), jobs in commands.items()]
    return "Made by:\n\n" + "\n".join(lines)


def epochs_csv(result: Result) -> str:
    """The figures of each epoch as CSV, a line for each."""
    return as_csv(result.epochs)


def as_csv(lines: list[dict[str, Any]]) -> str:
    """The lines as CSV under the names that any of them has; what a line lacks is left empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _first_flaw(values: dict[str, Any]) -> str:
    """The name of the first part of a result that is missing, of another type, or not finite; "" where all is well."""
    needed = {part.name for part in fields(Result) if part.default is MISSING}
    return _flaw_within(values, get_type_hints(Result), needed)


def _flaw_within(values: dict[str, Any], hints: dict[str, Any], needed: Collection[str]) -> str:
    for name, kind in hints.items():
        flaw = _flaw(values[name], kind, name) if name in values else name * (name in needed)
        if flaw:
            return flaw
    return next((name for name, value in values.items() if isinstance(value, float) and not _is_number(value)), "")


def _flaw(value: Any, kind: Any, name: str) -> str:
    if is_typeddict(kind):
        needed = kind.__required_keys__
        return _flaw_within(value, get_type_hints(kind), needed) if isinstance(value, dict) else name
    if isinstance(kind, UnionType):
        return name * all(_flaw(value, part, name) for part in get_args(kind))
    if get_origin(kind) is list:
        (part,) = get_args(kind)
        return next(filter(None, (_flaw(item, part, name) for item in value)), "") if _filled_list(value) else name
    if kind in (int, float):
        return name * (not _is_number(value) or (kind is int and not isinstance(value, int)))
    return name * (not isinstance(value, kind))


def _filled_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


_is_number = parsed.number()


def _is_name(value: Any) -> bool:
    """Whether it is what a job, a run or a setting may be called: text without any markup."""
    return isinstance(value, str) and 0 < len(value) <= 300 and in_markdown(value) == value


def _is_recipe(value: dict[str, Any]) -> bool:
    values = [part for own in value.values() for part in (own if isinstance(own, list) else [own])]
    plain = all(part is None or isinstance(part, bool) or parsed.text(part) or _is_number(part) for part in values)
    return plain and all(map(_is_name, value)) and not parsed.flaw(value, RECIPE_RANGES)


def _all_text(value: dict[str, Any]) -> bool:
    return all(map(parsed.text, value.values()))


def _or_none(check: parsed.Check) -> parsed.Check:
    return lambda value: value is None or check(value)


PERCENT, COUNT, NUMBER = parsed.number(0, 100 + 1e-6), parsed.whole(1), parsed.whole(0)
NOT_NEGATIVE = parsed.number(-1e-6)  # but for rounding
# What figures and names may be, besides their types; each part of the result by its name.
RECIPE_RANGES: dict[str, parsed.Check] = {
    **dict.fromkeys(("epochs", "batch_size", "scheduler_step"), COUNT),
    **dict.fromkeys(("learning_rate", "beta", "gamma"), NOT_NEGATIVE),
    "alpha": lambda value: isinstance(value, str) or parsed.number(0, 1)(value),
    "weight": _or_none(NOT_NEGATIVE),
}
RANGES: dict[str, dict[str, parsed.Check]] = {
    "": {
        **dict.fromkeys(("job", "name", "dataset"), _is_name),
        **dict.fromkeys(("precision", "batch_norm", "stem", "device"), parsed.text),
        "seed": parsed.whole(0, 2**32 - 1),
        "suite": lambda value: re.fullmatch(r"[\w.]{0,100}", value) is not None,  # a part of a file's name
        "recipe": _is_recipe,
        "teacher_top1": _or_none(PERCENT),
        "processes": COUNT,
        "versions": _all_text,
        **dict.fromkeys(("seconds", "images_per_second", "extra_parameters", "peak_memory"), NOT_NEGATIVE),
    },
    "data": {
        **dict.fromkeys(("train_images", "test_images", "classes", "image_size"), COUNT),
        "val_images": NUMBER,
    },
    "test": {**dict.fromkeys(("top1", "top5"), PERCENT), **dict.fromkeys(("test_loss", "mean_ce"), NOT_NEGATIVE)},
    "claimed": {"top1": PERCENT, "epochs": COUNT},
    "warm_start": {"epochs": COUNT, "checkpoint_sha256": parsed.text},
}
STRETCH_RANGES = {
    **dict.fromkeys(("from_epoch", "from_batch", "to_epoch", "to_batch"), NUMBER),
    "processes": COUNT,
    "versions": _all_text,
}
EPOCH_RANGES = {
    **dict.fromkeys(("train_top1", "val_top1"), PERCENT),
    **dict.fromkeys(("seconds", "learning_rate", "val_loss"), NOT_NEGATIVE),
}


def _impossible(values: dict[str, Any]) -> str:
    """The name of the first figure of a result, otherwise whole, that can't be; "" where all can."""
    data, test, epochs = values["data"], values["test"], values["epochs"]
    teacher = values.get("teacher")
    told = teacher and isinstance(teacher.get("sha256"), str) and values["teacher_top1"] is not None
    bad = ["teacher"] * (teacher is not None and not told)
    parts = {part: values[part] if part else values for part in RANGES if not part or values.get(part)}
    bad += [parsed.flaw(part, RANGES[name]) for name, part in parts.items()]
    bad += [parsed.flaw(epoch, EPOCH_RANGES) for epoch in epochs]
    bad += [name for epoch in epochs for name, value in epoch.items() if not _is_number(value)]
    bad += [parsed.flaw(part, STRETCH_RANGES) for part in values.get("stretches") or ()]
    in_order = all(epoch["epoch"] == number for number, epoch in enumerate(epochs, 1))
    whole = len(epochs) == values["recipe"]["epochs"] and in_order
    bad += ["epochs"] * (not (whole and all(_is_name(name) for epoch in epochs for name in epoch)))
    bad += ["top5"] * (test["top5"] < test["top1"] - 1e-6)
    bad += ["images"] * (test.get("images", data["test_images"]) != data["test_images"])
    bad = [*filter(None, bad)]
    if not bad and "correct" in test:
        try:
            right = _unpacked(test["correct"], data["test_images"])
        except ValueError:
            return "correct"
        if abs(100 * right.mean() - test["top1"]) > 1e-6:
            bad.append("correct")
    return next(iter(bad), "")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value, of JSON's types, with each text in it changed."""
    if isinstance(value, dict):
        return {change(key): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _unpacked(text: str, images: int) -> numpy.ndarray:
    """The booleans of so many images. Raises ValueError where the text holds another number of them."""
    packed = numpy.frombuffer(base64.b64decode(text, validate=True), numpy.uint8)
    if len(packed) != -(-images // 8):
        raise ValueError(f"{len(packed)} bytes do not hold the bits of {images} images")
    return numpy.unpackbits(packed, count=images).astype(bool)
