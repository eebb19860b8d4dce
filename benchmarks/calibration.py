"""Whether the tables' verdicts and intervals are right, from simulated tables: python benchmarks/calibration.py

Makes tables of the thirteen rows and of each suite, with and without a true difference, from simulated runs through the
functions that make RESULTS.md and SUITE.md, and reads them: how many say that rows differ which do not, how many of the
95 % intervals hold the truth, how many find a row that is 1 point better. Writes calibration.json, and RESULTS.md with
it, beside itself.
"""

import argparse
import base64
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from recipes import RECIPES, described  # noqa: E402
from report import statistics, suite, table  # noqa: E402
from report.results import Result, Rows  # noqa: E402
from zoo.suites import SUITES, run_of  # noqa: E402

TOP1 = 60.0
# As in studies/cifar100 and studies/schedules: two seeds of a row disagree on 15.5 % of 10,000 test images, and one
# run's top-1 spreads by 0.41 points, 0.28 of them from these images and 0.30 from the run as a whole. A seed moves all
# its rows by less than can be told there; it is given half of a run's spread.
RUN, SEED = 0.30, 0.20
SHARED = 0.882  # of the variance of an image's score is the image's, the rest the run's: so they disagree as often

INTERVAL = re.compile(r"\[([+-][\d.]+), ([+-][\d.]+)\](?! over images)")
EVIDENCE = re.compile(
    r"^- (\S+)(?: †)? against (\S+)(?: †)?: .*95 % interval ([+-][\d.]+) to ([+-][\d.]+)\)(.*)$", re.M
)
P = re.compile(r"(?<!McNemar )p (<?)([\d.]+)")
THIRTEEN = "the thirteen rows"
BETTER = {THIRTEEN: "distillation_LDH6", "benchmark": "crd", "losses": "crd", "schedules": "mse_per_epoch"}


@dataclass(frozen=True)
class Kind:
    """A kind of tables. seeds: of each row; of every third row, and of all others, where there are two numbers.

    gains: row -> by how many points it is truly above the others.
    """

    table: str
    seeds: tuple[int, ...]
    claims: bool = False
    images: int = 10000
    gains: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> dict[str, int]:
        """The rows' short names and how many seeds each has; the first student and kd have all."""
        names = list(RECIPES) if self.table == THIRTEEN else list(SUITES[self.table].runs)
        return {name: self.seeds[0 if i % 3 == 0 or i < 3 else -1] for i, name in enumerate(names)}


def kinds() -> list[Kind]:
    """All kinds that are simulated."""
    found = []
    for name, better in BETTER.items():
        found += [Kind(name, seeds) for seeds in ((1,), (2,), (3,), (2, 1), (3, 1))]
        found += [Kind(name, (seeds,), gains={better: 1.0}) for seeds in (2, 3)]
    found += [Kind(THIRTEEN, seeds, claims=True) for seeds in ((1,), (2,), (3,), (3, 1))]
    schedules = [f"distillation_KMJ{i}" for i in range(3)]
    for seeds, images, gain in ((3, 2000, 1.0), (12, 2000, 0.5), (12, 10000, 0.5), (12, 10000, 0.0)):
        found.append(Kind(THIRTEEN, (seeds,), True, images, dict.fromkeys(schedules, gain)))
    return found


def simulated(kind: Kind, rng: numpy.random.Generator) -> tuple[Rows, float]:
    """The runs of one table, with which of the test images each got right; and the mean top-1 over seeds on these."""
    from scipy.special import ndtr

    rows = kind.rows()
    runs = [(name, seed) for name, seeds in rows.items() for seed in range(seeds)]
    scale = 1 / 100 / _density()  # points of top-1 to the latent score
    seeds = rng.normal(0, SEED, max(rows.values()))
    points = [kind.gains.get(name, 0.0) + seeds[seed] + rng.normal(0, RUN) for name, seed in runs]
    image = math.sqrt(SHARED) * rng.standard_normal(kind.images, numpy.float32) + _threshold()
    own = math.sqrt(1 - SHARED) * rng.standard_normal((len(runs), kind.images), numpy.float32)
    right = image + own > -scale * numpy.array(points, numpy.float32)[:, None]
    found = Rows()
    for (name, seed), marks in zip(runs, right, strict=True):
        run = _result(kind, name, seed, marks)
        found.setdefault(run.name, {})[seed] = run
    over_seeds = math.sqrt(1 - SHARED + scale**2 * (RUN**2 + SEED**2))
    return found, 100 * float(ndtr(image / over_seeds).mean())


def _threshold() -> float:
    from scipy.special import ndtri

    return float(ndtri(TOP1 / 100))


def _density() -> float:
    return math.exp(-(_threshold() ** 2) / 2) / math.sqrt(2 * math.pi)


def _result(kind: Kind, name: str, seed: int, right: numpy.ndarray) -> Result:
    recipe = RECIPES[name] if kind.table == THIRTEEN else _run_of(kind.table, name)
    values = described(recipe) | {"arch": None if kind.table == THIRTEEN else "resnet20"}
    data = {"train_images": 50000, "test_images": kind.images, "classes": 100, "image_size": 32, "val_images": 0}
    top1 = 100 * float(right.mean())
    correct = base64.b64encode(numpy.packbits(right)).decode()
    return Result(
        job=recipe.job, name=recipe.job, dataset="simulated", data={**data, "test_fingerprint": "simulated"}, seed=seed,
        precision="bf16", recipe=values, teacher={"sha256": "ab"} if recipe.distils else None,
        teacher_top1=70.0 if recipe.distils else None, epochs=[{"epoch": 1, "train_loss": 1.0, "train_top1": 50.0}],
        test={"top1": top1, "top5": 85.0, "test_loss": 0.01, "mean_ce": 2.5, "correct": correct}, seconds=1.0,
        images_per_second=1.0, versions={}, device="simulated", command="simulated", suite=recipe.suite,
    )  # fmt: skip


def _run_of(name: str, run: str):
    return run_of(SUITES[name].runs[run], name, run, name)


@dataclass
class Read:
    """What one table says. wrong: whether it says that rows differ which don't, or claims so; found: the better row."""

    wrong: bool = False
    found: bool = False
    within: bool = False
    intervals: int = 0
    covering: int = 0
    own: int = 0
    own_covering: int = 0


def read(kind: Kind, rows: Rows, expected: float) -> Read:
    """Make the table and read it."""
    found = _read_results(kind, rows) if kind.table == THIRTEEN else _read_suite(kind, rows)
    for name, (low, high) in statistics.own_intervals(rows).items():
        if len(rows[name]) > 1 and not any(kind.gains.values()):
            found.own += 1
            found.own_covering += low <= expected <= high
    return found


def _cells(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    titles, _, *rows = lines
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def _tally(found: Read, text: str, truth: float) -> None:
    for low, high in INTERVAL.findall(text):
        found.intervals += 1
        found.covering += float(low) <= truth <= float(high)


def _read_results(kind: Kind, rows: Rows) -> Read:
    text, found = table.markdown(rows, kind.claims), Read()
    for marked, cells in _cells(text).items():
        name = marked.removesuffix(" †")
        truth = kind.gains.get(name, 0.0) - kind.gains.get("student", 0.0)
        _tally(found, cells.get("gain", ""), truth)
        yes = cells.get("beyond noise") == "yes"
        found.found |= yes and name == BETTER[kind.table]
        found.wrong |= yes and truth == 0
    for ours, theirs, low, high, words in EVIDENCE.findall(text):
        truth = kind.gains.get(ours, 0.0) - kind.gains.get(theirs, 0.0)
        _tally(found, f"[{low}, {high}]", truth)
        found.wrong |= truth == 0 and "beyond noise" in words and "not beyond noise" not in words
    verdicts = dict(re.findall(r"^\*\*(.*): (yes|no|not settled)\.\*\*$", text, re.M))
    for words, verdict in verdicts.items():
        if "within noise" in words:
            found.within = verdict == "yes"
            found.wrong |= verdict == "no" and not any(kind.gains.values())
        else:
            found.wrong |= verdict != "not settled" and not any(kind.gains.values())
    return found


def _read_suite(kind: Kind, rows: Rows) -> Read:
    (made,), found = suite.suites_of(rows), Read()
    names = {made.label(name): _short(kind, name) for name in made}
    for label, cells in _cells(suite.markdown([made])).items():
        gain = kind.gains.get(names[label], 0.0)
        for title in ("to the student alone", "to kd", "to its constant"):
            cell = cells.get(title, "")
            _tally(found, cell, gain)
            yes = any(less or float(p) < statistics.LEVEL for less, p in P.findall(cell))
            found.wrong |= yes and gain == 0
            found.found |= yes and gain != 0 and title == "to the student alone"
    bold = {name for name, each in made.to_constant().items() if each.beyond_noise}
    found.wrong |= any(kind.gains.get(_short(kind, name), 0.0) == 0 for name in bold)
    return found


def _short(kind: Kind, name: str) -> str:
    return name.removeprefix(f"{kind.table}_")


def calibrate(kind: Kind, tables: int, seed: int) -> dict:
    """What so many tables of this kind say, as shares."""
    rng, total = numpy.random.default_rng([seed, *repr(kind).encode()]), Counter()
    for _ in range(tables):
        total.update(asdict(read(kind, *simulated(kind, rng))))
    shares = {name: total[name] / tables for name in ("wrong", "found", "within")}
    shares["covering"] = total["covering"] / total["intervals"] if total["intervals"] else None
    shares["own_covering"] = total["own_covering"] / total["own"] if total["own"] else None
    return {**asdict(kind), **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate tables, and read what they say.")
    parser.add_argument("--tables", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = []
    for kind in kinds():
        found.append(calibrate(kind, args.tables, args.seed))
        print(found[-1], file=sys.stderr, flush=True)
    measured = {
        "command": " ".join(["benchmarks/calibration.py", *sys.argv[1:]]),
        "tables": args.tables,
        "kinds": found,
    }
    (HERE / "calibration.json").write_text(json.dumps(measured, indent=1) + "\n")

    from speed import write_results

    write_results()


if __name__ == "__main__":
    main()
