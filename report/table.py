"""Results to a table and plots: the JSON of each run in, RESULTS.md, results.csv, top1.png and curves.png out."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes import RECIPES
from util import files
from util.runtime import UserError

Run = dict[str, Any]
Rows = dict[str, dict[int, Run]]  # job -> seed -> run; jobs in the order of RECIPES, seeds ascending

NUMBER = (int, float)

# What a run's JSON must hold for the report; it may hold more.
FORM = {
    "job": str,
    "seed": int,
    "dataset": str,
    "data": {"train_images": int, "test_images": int, "classes": int, "image_size": int},
    "recipe": {
        "soft": object,
        "alpha": object,
        "T": object,
        "beta": NUMBER,
        "gamma": NUMBER,
        "epochs": int,
        "scheduler_step": int,
        "learning_rate": NUMBER,
        "batch_size": int,
    },
    "teacher_top1": (int, float, type(None)),
    "epochs": [{"epoch": int, "train_loss": NUMBER, "train_top1": NUMBER}],
    "test": {"top1": NUMBER, "top5": NUMBER, "test_loss": NUMBER, "mean_ce": NUMBER},
    "seconds": NUMBER,
    "images_per_second": NUMBER,
    "versions": dict,
    "device": str,
    "precision": str,
    "command": str,
}

# Title, the figure of a run, and its format.
MEASURED: list[tuple[str, Callable[[Run], float], str]] = [
    ("top-1", lambda run: run["test"]["top1"], ".2f"),
    ("top-5", lambda run: run["test"]["top5"], ".2f"),
    ("Test Loss", lambda run: run["test"]["test_loss"], ".8f"),
    ("mean CE", lambda run: run["test"]["mean_ce"], ".4f"),
    ("seconds", lambda run: run["seconds"], ",.1f"),
    ("images/s", lambda run: run["images_per_second"], ",.0f"),
]

# The data on which the reference's figures were measured.
REFERENCE_DATA = {"train_images": 50000, "test_images": 10000, "classes": 100, "image_size": 32}

# Families of rows by (network, soft loss): a colour each; within a family the line style tells the rows apart.
COLOURS = {
    ("teacher", None): "#e08214",
    ("student", None): "#404040",
    ("student", "kd"): "#2171b5",
    ("feature_student", "kd"): "#238b45",
    ("feature_student", "mse"): "#b2182b",
}
OTHER_COLOUR = "#7a5195"
LINE_STYLES = ["-", "--", "-.", ":"]


def write(results_dir: Path) -> list[Path]:
    """Write RESULTS.md, results.csv, top1.png and curves.png beside the runs' JSONs; give their paths.

    Raises UserError where there is no run, where one is damaged, or where two are not of the same data.
    """
    rows = read(results_dir)
    contents = {
        "RESULTS.md": markdown(rows).encode(),
        "results.csv": comma_separated(rows).encode(),
        "top1.png": top1_plot(rows),
        "curves.png": curves_plot(rows),
    }
    for name, content in contents.items():
        with files.replacing(results_dir / name) as file:
            file.write(content)
    return [results_dir / name for name in contents]


def read(results_dir: Path) -> Rows:
    """The runs in the folder, all of them whole and of the same data. Raises UserError."""
    runs = {path: _read_run(path) for path in sorted(results_dir.glob("*_seed*.json"))}
    if not runs:
        raise UserError(f"{results_dir} holds no results (<job>_seed<number>.json); train something first")
    first, *others = runs
    for path in others:
        if _data(runs[path]) != _data(runs[first]):
            raise UserError(
                f"{first} and {path} are of different data ({_data(runs[first])}; {_data(runs[path])}); "
                "a table must not mix them: keep each in a folder of its own"
            )
    rows: Rows = {}
    for run in sorted(runs.values(), key=lambda run: (list(RECIPES).index(run["job"]), run["seed"])):
        rows.setdefault(run["job"], {})[run["seed"]] = run
    return rows


def _read_run(path: Path) -> Run:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged (cut short?), not JSON; delete it and run its job again") from None
    flaw = _flaw(run, FORM, "the whole")
    if flaw:
        raise UserError(f"{path} is no whole result ({flaw} is missing or wrong); delete it and run its job again")
    if run["job"] not in RECIPES:
        raise UserError(f"{path} is of the job {run['job']}, which recipes.py does not have; move it away")
    if path.name != f"{run['job']}_seed{run['seed']}.json":
        raise UserError(f"{path} holds {run['job']} with seed {run['seed']}: not what its name says; move it away")
    return run


def _flaw(value: Any, form: Any, name: str) -> str:
    """The name of the first part of the value that has not the form's type, or is not finite; "" where all is well."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return name
        flaws = (_flaw(value[key], part, key) if key in value else key for key, part in form.items())
        return next(filter(None, flaws), "")
    if isinstance(form, list):
        if not isinstance(value, list) or not value:
            return name
        return next(filter(None, (_flaw(item, form[0], name) for item in value)), "")
    finite = not isinstance(value, float) or math.isfinite(value)
    return "" if isinstance(value, form) and finite else name


def _data(run: Run) -> str:
    data = run["data"]
    return (
        f"{run['dataset']}, {data['train_images']:,} training and {data['test_images']:,} test images of "
        f"{data['image_size']}x{data['image_size']} pixels, {data['classes']} classes"
    )


def top1(rows: Rows, job: str) -> float:
    """The mean over seeds of a row's top-1, in percent."""
    return statistics.mean(run["test"]["top1"] for run in rows[job].values())


def gains(rows: Rows, job: str) -> list[float]:
    """What the row gains on the student in points of top-1, one figure for each seed that both have.

    Empty where there is none, and for the teacher and the student itself.
    """
    if RECIPES[job].network == "teacher" or job == "student":
        return []
    baseline = rows.get("student", {})
    return [run["test"]["top1"] - baseline[seed]["test"]["top1"] for seed, run in rows[job].items() if seed in baseline]


def standard_error(rows: Rows) -> float:
    """The binomial standard error, in points, of one run's top-1: sqrt(p (1 - p) / n) for the median row."""
    n = _any_run(rows)["data"]["test_images"]
    p = statistics.median(top1(rows, job) for job in rows) / 100
    p = min(max(p, 1 / n), 1 - 1 / n)  # no row is so good, or so bad, that n images tell its top-1 exactly
    return 100 * math.sqrt(p * (1 - p) / n)


def noise(rows: Rows) -> float:
    """Differences of top-1 under about this many points are noise: two standard errors of a difference of two runs."""
    return 2 * math.sqrt(2) * standard_error(rows)


def departures(run: Run) -> list[str]:
    """In what the run departs from its row of recipes.py, which is the reference's."""
    names = ("epochs", "scheduler_step", "learning_rate", "batch_size", "alpha", "T", "beta", "gamma")
    recipe = RECIPES[run["job"]]
    pairs = [(name, run["recipe"][name], getattr(recipe, name)) for name in names]
    found = [f"{name} {here} instead of {there}" for name, here, there in pairs if here != there]
    if run.get("augment"):
        found.append("augmented images")
    if run.get("weights") not in (None, "imagenet"):
        found.append(f"a teacher that starts from the weights {run['weights']} instead of imagenet")
    return found


def markdown(rows: Rows) -> str:
    """RESULTS.md."""
    parts = [
        f"# Results on {_any_run(rows)['dataset']}",
        _heading(rows),
        _table(rows),
        "\n".join(f"- {note}" for note in _notes(rows)),
        "![top-1 of each row](top1.png)",
        "![training curves of each row](curves.png)",
        "## What it shows",
        "\n".join(f"- {fact}" for fact in findings(rows)),
    ]
    if _is_check(rows):
        parts.insert(0, "**This is a check of the pipeline, not a result.**")
    return "\n\n".join(parts) + "\n"


def _heading(rows: Rows) -> str:
    runs = list(_runs(rows))
    facts = {
        "Data": [_data(runs[0])],
        "Device": [run["device"] for run in runs],
        "Precision": [run["precision"] for run in runs],
        "Versions": [", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs],
        "Top-1 of the teacher distilled from": [
            f"{run['teacher_top1']:.2f}" for run in runs if run["teacher_top1"] is not None
        ],
    }
    lines = [f"- {name}: {'; '.join(dict.fromkeys(values))}" for name, values in facts.items() if values]
    commands = dict.fromkeys(f"    python {run['command']}" for run in runs)
    return "\n".join(lines) + "\n\nMade by:\n\n" + "\n".join(commands)


def _table(rows: Rows) -> str:
    """The Markdown table: a row for each job, means over its seeds."""
    with_seeds, with_reference = _has_several_seeds(rows), _has_reference(rows)
    titles = ["job", *(title for title, _, _ in MEASURED), "epochs", "gain"]
    titles += ["seeds"] * with_seeds
    titles += ["reference top-1", "reference top-5", "reference Test Loss"] * with_reference
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for job, seeds in rows.items():
        cells = [job, *(_spread([figure(run) for run in seeds.values()], form) for _, figure, form in MEASURED)]
        cells += [", ".join(dict.fromkeys(str(run["recipe"]["epochs"]) for run in seeds.values())), _gain(rows, job)]
        cells += [str(len(seeds))] * with_seeds
        if with_reference:
            reference = RECIPES[job].reference
            cells += (
                [f"{reference.top1:.2f}", f"{reference.top5:.2f}", f"{reference.test_loss:.8f}"]
                if reference
                else [""] * 3
            )
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(values: list[float], form: str) -> str:
    """The mean, with the sample standard deviation (n - 1) where there are several values."""
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {format(statistics.stdev(values), form.lstrip('+'))}"
    return text


def _gain(rows: Rows, job: str) -> str:
    """The cell of the gain, which says over how many seeds it is where these are not all of the row's."""
    paired = gains(rows, job)
    if not paired:
        return ""
    over = f" (seeds in common: {len(paired)})" if len(paired) < len(rows[job]) else ""
    return _spread(paired, "+.2f") + over


def _notes(rows: Rows) -> list[str]:
    """What one must know to read the table."""
    n = _any_run(rows)["data"]["test_images"]
    batches = math.ceil(n / 256)
    notes = [
        "top-1 and top-5 are percentages of the test images; gain: over the student, in points of top-1, seed by seed.",
        "Test Loss is the sum over batches of 256 test images of each batch's mean CE, divided by the number of test "
        f"images: about mean CE / 256 on a large test set; here {batches} batches for {n:,} images, so about mean CE / "
        f"{n / batches:.0f}.",
        f"Noise: the standard error of one top-1 on {n:,} test images is {standard_error(rows):.2f} points (binomial, "
        f"for the median row), so differences under about twice sqrt(2) that, {noise(rows):.2f} points, are noise. "
        "Two rows are tested on the same images, which makes this a careful limit for their difference; gaps below "
        "about 0.4 points are inside the noise of one seed on CIFAR-100's 10,000 images all the same.",
    ]
    if _has_several_seeds(rows):
        notes.append("±: the sample standard deviation (n - 1) over the seeds.")
    return notes + _departure_notes(rows)


def _departure_notes(rows: Rows) -> list[str]:
    """One note for each way of departing from the reference, with the jobs that do."""
    jobs: dict[str, list[str]] = {}
    for run in _runs(rows):
        text = ", ".join(departures(run))
        if text and run["job"] not in jobs.setdefault(text, []):
            jobs[text].append(run["job"])
    notes = [f"Not the reference's recipe: {', '.join(names)} ran with {text}." for text, names in jobs.items()]
    if _has_reference(rows) and _any_run(rows)["data"] != REFERENCE_DATA:
        notes.append("Not the reference's data: that is 50,000 training and 10,000 test images of 32x32 pixels.")
    if notes:
        notes.append(
            "Figures of shortened or otherwise changed runs, and of students of such a teacher, do not compare with "
            "the reference."
        )
    return notes


def findings(rows: Rows) -> list[str]:
    """Facts that follow from the figures alone: the best student row, its gain, and whether that exceeds the noise."""
    students = [job for job in rows if RECIPES[job].network != "teacher"]
    if not students:
        return ["Only the teacher ran: there is nothing to compare it with."]
    best = max(students, key=lambda job: top1(rows, job))
    facts = [f"Best of the students that ran ({len(students)}) by mean top-1: {best}, {top1(rows, best):.2f} %."]
    paired = gains(rows, best)
    if "student" not in rows:
        facts.append("The student on hard labels alone did not run, so there is no gain to tell.")
    elif students == ["student"]:
        facts.append("No distilled row ran, so there is no gain to tell.")
    elif best == "student":
        facts.append("No distilled row is above the student on hard labels alone.")
    elif not paired:
        facts.append("It has no seed in common with the student, so there is no gain to tell.")
    else:
        facts += _gain_facts(paired, noise(rows))
        if len(students) > 2:
            facts.append("It is the best of several on the same test images, which flatters its gain a little.")
    return facts


def _gain_facts(paired: list[float], limit: float) -> list[str]:
    gain = statistics.mean(paired)
    relation = "more than" if gain > limit else "not more than"
    facts = [
        f"Its gain on the student is {gain:+.2f} points of top-1, {relation} the {limit:.2f} points of noise above."
    ]
    if len(paired) == 1:
        facts.append("That is one seed: how far another seed would move it is not known from these runs.")
    else:
        facts.append(f"Seed by seed it is {', '.join(f'{value:+.2f}' for value in paired)}.")
    return facts


def comma_separated(rows: Rows) -> str:
    """results.csv: one line for each run, nothing averaged."""
    lines = [_flat(run) for run in _runs(rows)]
    file = io.StringIO()
    writer = csv.DictWriter(file, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _flat(run: Run) -> dict[str, Any]:
    return {
        "job": run["job"],
        "seed": run["seed"],
        "dataset": run["dataset"],
        **{name: run["test"][name] for name in FORM["test"]},
        "epochs": run["recipe"]["epochs"],
        "seconds": run["seconds"],
        "images_per_second": run["images_per_second"],
        "precision": run["precision"],
        "device": run["device"],
        "teacher_top1": run["teacher_top1"],
        **{name: run["recipe"][name] for name in FORM["recipe"]},
    }


def top1_plot(rows: Rows) -> bytes:
    """top1.png: a bar for each row, 1200 pixels wide."""
    figure = _figure(height=1.7 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for y, (job, seeds) in enumerate(rows.items()):
        values = [run["test"]["top1"] for run in seeds.values()]
        mean, error = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
        axes.barh(y, mean, height=0.66, color=_colour(job), xerr=error or None, error_kw={"capsize": 3})
        if _has_reference(rows) and RECIPES[job].reference:
            reference = RECIPES[job].reference.top1
            axes.plot(reference, y, "D", color="white", markeredgecolor="black", markersize=6, zorder=4)
        # In a column: beside a reference far from its bar, a value would pass for the reference's.
        axes.text(0.99, y, _spread(values, ".2f"), transform=axes.get_yaxis_transform(), ha="right", va="center")
    if "student" in rows:
        axes.axvline(top1(rows, "student"), color=_colour("student"), linestyle="--", linewidth=1.2, label="student")
    if _has_reference(rows):
        axes.plot([], [], "D", color="white", markeredgecolor="black", label="reference (one run)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)  # room for the column of values
    axes.set_xlabel("top-1 on the test images, %" + (", mean ± standard deviation" * _has_several_seeds(rows)))
    axes.set_title(_title(rows, "Top-1"))
    return _png(figure)


def curves_plot(rows: Rows) -> bytes:
    """curves.png: each row's training loss (its own objective) and training top-1 over the epochs."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure = _figure(height=9)
    upper, lower = figure.subplots(2, 1, sharex=True)
    drawn: dict[str, int] = {}  # how many lines have the colour already
    for job, seeds in rows.items():
        colour = _colour(job)
        style = LINE_STYLES[drawn.get(colour, 0) % len(LINE_STYLES)]
        drawn[colour] = drawn.get(colour, 0) + 1
        for axes, name in ((upper, "train_loss"), (lower, "train_top1")):
            points = _mean_curve(seeds.values(), name)
            marker = "o" if len(points) < 10 else None  # a single epoch has no line to see
            line = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4, "linewidth": 1.6}
            axes.plot(range(1, len(points) + 1), points, **line, label=job if axes is upper else None)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10 to the -1
    upper.yaxis.set_minor_formatter(LogFormatter())
    upper.set_ylabel("training loss, each row's own objective")
    lower.set_ylabel("training top-1, %")
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # 1 alone, too
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", handlelength=3.5, frameon=False)
    upper.set_title(_title(rows, "Training" + ", means over seeds" * _has_several_seeds(rows)))
    return _png(figure)


def _mean_curve(runs: Iterable[Run], name: str) -> list[float]:
    """The mean over runs, epoch by epoch, as far as the shortest goes."""
    curves = [[epoch[name] for epoch in run["epochs"]] for run in runs]
    return [statistics.mean(values) for values in zip(*curves, strict=False)]


def _figure(height: float):
    """An empty figure, 1200 pixels wide; matplotlib is imported here, so that importing the report stays fast."""
    from matplotlib.figure import Figure

    return Figure(figsize=(12, height), dpi=100, layout="constrained")


def _png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _title(rows: Rows, what: str) -> str:
    return f"{what}: {_any_run(rows)['dataset']}" + " (a check of the pipeline, not a result)" * _is_check(rows)


def _colour(job: str) -> str:
    return COLOURS.get((RECIPES[job].network, RECIPES[job].soft), OTHER_COLOUR)


def _runs(rows: Rows) -> Iterable[Run]:
    return (run for seeds in rows.values() for run in seeds.values())


def _any_run(rows: Rows) -> Run:
    """A run, for what all have in common."""
    return next(iter(_runs(rows)))


def _has_several_seeds(rows: Rows) -> bool:
    return any(len(seeds) > 1 for seeds in rows.values())


def _has_reference(rows: Rows) -> bool:
    return _any_run(rows)["dataset"] == "cifar100"


def _is_check(rows: Rows) -> bool:
    return _any_run(rows)["dataset"] == "digits"
