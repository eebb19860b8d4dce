"""Results side by side: what settings differ, figures, McNemar's test, and the images on which runs disagree.

    python compare.py student distillation_LDH6
    python compare.py student_seed0 student_seed1 elsewhere/student_seed0.json
    python compare.py student distillation --dataset digits --sheet differ.png

A run is a result's JSON, or the name of a run in <results_dir>; each is held against the first. The sheet shows images
that one got right and another wrong, with their true classes.
"""

import difflib
import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy
import torch

import cli
import data
import report
from images.folders import ImageFiles
from report import plots, side_by_side
from report.results import NAMES, Result
from report.side_by_side import Runs
from util import files, runtime
from util.runtime import UserError, say
from util.text import printable

ON_A_SHEET = 48  # images
LETTERS = 26  # by which a sheet names the runs


def main() -> None:
    parser = cli.Parser(description="Results side by side.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a result's JSON, or a run's name: student, student_seed1"
    )
    parser.add_argument(
        "--sheet", type=png, metavar="FILE.png", help=f"show up to {ON_A_SHEET} test images on which the runs disagree"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a sheet that is there")
    cli.add_data_flags(parser)
    cli.add_results_flag(parser)
    args = parser.parse_args()
    refuse_idle(args)

    report.require()
    runs = read(args.runs, cli.results_dir(args))
    print(side_by_side.text(runs), flush=True)
    apart = side_by_side.unpaired(runs)
    for line in apart:
        say(line)
    if args.sheet:
        if apart:
            raise UserError("--sheet: the runs can't be compared image by image; name others, or leave it away")
        write_sheet(runs, args)
        say(f"wrote {args.sheet}")


def refuse_idle(args: Namespace) -> None:
    """Raise UserError for flags of the sheet where none is drawn, and for a sheet that is there already."""
    for flag in ("image_size", "stream", "skip_unreadable", "overwrite"):
        if getattr(args, flag) and not args.sheet:
            raise UserError(f"--{flag} is for --sheet; give that, or leave the flag away")
    if args.sheet and args.sheet.exists() and not args.overwrite:
        raise UserError(f"{args.sheet} is there; give --sheet another name, or replace it with --overwrite")


def png(text: str) -> Path:
    """An argparse type: a file to write that is a PNG."""
    path = cli.path(text)
    if path.suffix.lower() != ".png":
        raise ArgumentTypeError(f"{text}: a sheet is a PNG; give it a name that ends with .png")
    return path


def read(names: list[str], folder: Path) -> Runs:
    """The results that are named, under the names that they have here. Raises UserError."""
    paths = [find(name, folder) for name in names]
    real = [path.resolve() for path in paths]
    again = next((path for path, its in zip(paths, real, strict=True) if real.count(its) > 1), None)
    if again:
        raise UserError(f"{again} is named twice; compare a run with another one")
    if len(paths) == 1:
        raise UserError(f"{names[0]} is one run; name another one to compare it with")
    results = [Result.read(path) for path in paths]
    short = [f"{result.name}_seed{result.seed}" for result in results]
    unique = len({*short}) == len(short)
    return dict(zip(short if unique else map(printable, paths), results, strict=True))


def find(name: str, folder: Path) -> Path:
    """The file of the result of that name. Raises UserError, which tells of near names or of the run's seeds."""
    try:
        path = cli.path(name)
    except ArgumentTypeError as error:  # ~ of nobody
        raise UserError(str(error)) from None
    if path.is_file() and path.suffix != ".json":
        raise UserError(f"{name} is no result; give a result's JSON, or the name of a run in {folder}")
    if path.is_file():
        return path
    if path.suffix == ".json":
        raise UserError(f"{name}: there is no such file; give a result's JSON, or the name of a run in {folder}")
    there = {path.stem: path for path in sorted(folder.glob(NAMES)) if not path.name.startswith(".")}
    seeds = [run for run in there if re.fullmatch(rf"{re.escape(name)}_seed\d+", run)]
    if name in there or len(seeds) == 1:
        return there[name if name in there else seeds[0]]
    if seeds:
        raise UserError(f"{name} ran with {len(seeds)} seeds; name one of them: {', '.join(seeds)}")
    if not there:
        raise UserError(f"{name}: {folder} holds no results; give --results_dir, or --dataset, whose folder it is")
    close = difflib.get_close_matches(name, there, 5, 0.5) or list(there)[:5]
    raise UserError(f"{name}: no run of that name in {folder}; there are {', '.join(close)}")


def write_sheet(runs: Runs, args: Namespace) -> None:
    """Draw the images on which the runs differ most into the file that --sheet names. Raises UserError."""
    rights = numpy.stack([run.right for run in runs.values()])
    index, found = side_by_side.disagreement(rights, ON_A_SHEET)
    if not found:
        raise UserError("--sheet: there is none to draw, as the runs got the same images right")
    if len(runs) > LETTERS:
        raise UserError(f"--sheet: {len(runs)} runs are more than its {LETTERS} letters; name fewer")
    dataset = tested_on(next(iter(runs.values())), args)
    images = dataset.test.images
    chosen = torch.from_numpy(index)
    pixels = next(iter(images.read([chosen]))) if isinstance(images, ImageFiles) else images[chosen]
    classes = [dataset.classes[label] for label in dataset.test.labels[chosen].tolist()]
    what = "one got right and the other wrong" if len(runs) == 2 else "the runs are parted most evenly on"
    title = f"{len(index)} of the {found:,} test images that {what}"
    names = [f"{name}, top-1 {run.test['top1']:.2f} %" for name, run in runs.items()]
    with files.replacing(args.sheet, new=not args.overwrite) as file:
        file.write(plots.sheet(pixels.numpy(), classes, rights[:, index], names, title))


def tested_on(run: Result, args: Namespace) -> data.Dataset:
    """The data set that the flags ask for, if it is the one that the run was tested on. Raises UserError."""
    if args.dataset != run.dataset:
        raise UserError(f"--sheet: the runs were tested on {run.dataset}; give --dataset {run.dataset}")
    if args.dataset in data.RESIZED and args.image_size is None:
        args.image_size = run.data["image_size"]
    dataset = cli.load_data(args, runtime.choose(args.device, args.precision))
    if dataset.test_fingerprint != run.data["test_fingerprint"]:
        raise UserError(
            f"--sheet: the test images of {run.dataset} in {args.data_dir} are not those that the runs were tested on; "
            "give their --data_dir"
        )
    return dataset


if __name__ == "__main__":
    cli.run(main)
