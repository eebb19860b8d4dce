"""The table: RESULTS.md and results.csv."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from recipes import RECIPES, described
from report.findings import Judged, claim_pairs, claims_section, findings, p_value, unlike
from report.results import (
    CHOSEN_BY_TEST,
    CHOSEN_NOTE,
    LENGTH,
    SETUP,
    Result,
    Rows,
    as_csv,
    data_title,
    describe_data,
    epochs_of,
    length,
    made_by,
    made_on,
    marked,
    otherwise,
)
from report.statistics import (
    LEVEL,
    POWER,
    UNEVEN,
    Blocks,
    Comparison,
    chance_to_find,
    gains_on_student,
    judge,
    linked,
    noise,
    smallest_to_find,
    standard_error,
    student_pairs,
    uneven,
)

PACKAGES = ("python", "torch", "torchvision", "numpy")
# Title, the figure of a run, and its format.
MEASURED: list[tuple[str, Callable[[Result], float], str]] = [
    ("top-1", lambda run: run.test["top1"], ".2f"),
    ("top-5", lambda run: run.test["top5"], ".2f"),
    ("Test Loss", lambda run: run.test["test_loss"], ".8f"),
    ("mean CE", lambda run: run.test["mean_ce"], ".4f"),
]
HELD_OUT: list[tuple[str, Callable[[Result], float | None], str]] = [
    ("val loss", lambda run: run.epochs[-1].get("val_loss"), ".4f"),
    ("val top-1", lambda run: run.epochs[-1].get("val_top1"), ".2f"),
]
# What all students should have in common, besides what the other notes tell of; None: nothing to compare.
ALIKE: dict[str, Callable[[Result], Any]] = {
    "teacher": lambda run: run.teacher and f"the one of {run.teacher_top1:.2f} % ({run.teacher['sha256'][:8]})",
    **{what: SETUP[what] for what in ("precision", "batch norm", "stem")},
}
OVER_SEEDS = (
    "[ ]: the 95 % interval over seeds (Student's t) of this difference by itself; other test images could move it "
    "further. The spread of a run is pooled over all rows compared (randomised blocks, top-1 = row + seed). It is "
    "taken to be alike in all rows and serves rows of one seed, too."
)
OVER_IMAGES = (
    "over images: the 95 % interval over test images, one seed (Newcombe's for paired proportions). Other seeds would "
    "move the difference by more, so nothing is judged beyond noise or not."
)
MCNEMAR = "McNemar p (these two runs)"


def markdown(rows: Rows, with_claims: bool = False) -> str:
    """RESULTS.md."""
    rows = rows.in_markdown()
    judged = judge(rows, [*student_pairs(rows), *(claim_pairs(rows) if with_claims else [])])
    parts = [
        f"# Results on {data_title(rows.any_run)}, {length(rows)}",
        _heading(rows),
        _table(rows, judged),
        "\n".join(f"- {note}" for note in _notes(rows, judged)),
        "![top-1 of each row](top1.png)",
        "![training curves of each row](curves.png)",
        "## What it shows",
        "\n".join(f"- {fact}" for fact in findings(rows, judged)),
    ]
    if rows.are_a_check:
        parts.insert(0, "**This is a check of the pipeline, not a result.**")
    if with_claims:
        parts.append(claims_section(rows, judged))
    return "\n\n".join(parts) + "\n"


def _heading(rows: Rows) -> str:
    runs = list(rows.runs())
    facts = {
        "Data": [describe_data(runs[0])],
        **made_on(runs, lambda run: run.devices),
        "Precision": [run.precision for run in runs],
        "Versions": [_versions(run) for run in runs],
        "Top-1 of the teacher distilled from": [
            f"{run.teacher_top1:.2f}" for run in runs if run.teacher_top1 is not None
        ],
    }
    lines = [f"- {name}: {'; '.join(dict.fromkeys(values))}" for name, values in facts.items() if values]
    return "\n".join(lines) + f"\n\n{made_by(runs)}"


def _versions(run: Result) -> str:
    return ", ".join(f"{name} {run.versions[name]}" for name in PACKAGES if name in run.versions)


def _table(rows: Rows, judged: Judged) -> str:
    """The Markdown table: a line for each row, means over its seeds."""
    gains = gains_on_student(rows, judged)
    lines = [_cells(rows, name, gains.get(name)) for name in rows]
    return lines_as_table(lines, always=["job", "gain"])


def lines_as_table(lines: list[dict[str, str]], always: list[str]) -> str:
    """A Markdown table of the lines' cells under their titles; `always`: those shown even where all cells are empty."""
    titles = [title for title in lines[0] if any(line[title] for line in lines) or title in always]
    table = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    table += [[line[title] for title in titles] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _cells(rows: Rows, name: str, gain: Comparison | None) -> dict[str, str]:
    """The cells of a row under their titles; a column that is empty in all rows is not shown."""
    runs, reference = list(rows[name].values()), reference_of(rows, name)
    measured = [(title, [figure(run) for run in runs], form) for title, figure, form in (*MEASURED, *HELD_OUT)]
    return {
        "job": marked(name),
        **{title: spread(values, form) if values and None not in values else "" for title, values, form in measured},
        "epochs": ", ".join(dict.fromkeys(map(epochs_of, runs))),
        "gain": gain_cell(gain, len(runs)) if gain else "",
        "p": p_value(gain.adjusted) if gain and gain.adjusted is not None else "",
        "beyond noise": {True: "yes", False: "no", None: ""}[gain and gain.beyond_noise],
        MCNEMAR: ", ".join(map(p_value, gain.mcnemar.values())) if gain else "",
        "seeds": str(len(runs)) if rows.have_several_seeds else "",
        "reference top-1": f"{reference.top1:.2f}" if reference else "",
        "reference top-5": f"{reference.top5:.2f}" if reference else "",
        "reference Test Loss": f"{reference.test_loss:.8f}" if reference else "",
    }


def spread(values: list[float], form: str) -> str:
    """The mean, with the sample standard deviation (n - 1) where there are several values."""
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {format(statistics.stdev(values), form)}"
    return text


def gain_cell(gain: Comparison, seeds: int) -> str:
    """The cell of the gain, which says over how many seeds it is where these are not all of the row's."""
    text = f"{gain.gain:+.2f}"
    if gain.interval:
        text += " [{:+.2f}, {:+.2f}]".format(*gain.interval) + " over images" * (not gain.over_seeds)
    return text + f" (seeds in common: {len(gain.gains)})" * (len(gain.gains) < seeds)


def reference_of(rows: Rows, name: str):
    """The reference's figures for a row, where it has any and these runs are of CIFAR-100; else None."""
    return RECIPES[name].reference if name in RECIPES and rows.any_run.dataset == "cifar100" else None


def _notes(rows: Rows, judged: Judged) -> list[str]:
    """What one must know to read the table."""
    n = rows.any_run.data["test_images"]
    batches = math.ceil(n / 256)
    whose = " of the same network and training" * (len(rows.kinds) > 1)
    notes = [
        "top-1 and top-5 are percentages of the test images; gain: over the student"
        f"{whose}{_named_students(rows, judged)}, in points of top-1.",
        "Test Loss is the sum over batches of 256 test images of each batch's mean CE, divided by the number of test "
        f"images: about mean CE / 256 on a large test set; here {batches} batches for {n:,} images, so about mean CE / "
        f"{n / batches:.0f}.{_order_note(rows) * (n % 256 > 0)}",
        f"Over test images alone, the standard error of one top-1 on {n:,} of them is {standard_error(rows):.2f} "
        f"points (binomial, for the median row); {noise(rows):.2f} points is twice that of a difference of two. Rows "
        "tested on the same images are compared image by image, which tells more.",
    ]
    if rows.have_several_seeds:
        notes.append("±: the sample standard deviation (n - 1) over the seeds.")
    if rows.keys() & CHOSEN_BY_TEST:
        notes.append(CHOSEN_NOTE)
    if not rows.are_a_check:
        notes.append("docs/losses.md says which rows follow the original code, and which a line of text.")
    return notes + _gain_notes(rows, judged) + _held_out_notes(rows) + _unlike_notes(rows) + _departure_notes(rows)


def _named_students(rows: Rows, judged: Judged) -> str:
    """Which rows the gains are over, in brackets; "" if it is the row "student" alone."""
    over: dict[str, list[str]] = {}
    for name, student in student_pairs(rows):
        if (name, student) in judged:
            over.setdefault(student, []).append(name)
    if over.keys() <= {"student"}:
        return ""
    told = [f"{student} for {', '.join(names)}" if len(over) > 1 else student for student, names in over.items()]
    return f" ({'; '.join(told)})"


def _order_note(rows: Rows) -> str:
    """What Test Loss has to do with the images' order, where the last batch is a short one."""
    text = " The last, short batch weighs more, so Test Loss depends on the images' order, on CIFAR by about 1 %"
    if rows.any_run.dataset not in ("cifar100", "cifar10"):
        return f"{text}."
    others = [name for name in rows if any(run.test.get("order") != "official" for run in rows[name].values())]
    which = "" if len(others) == len(rows) else f" of {', '.join(others)}"
    return f"{text}; it is not the official files' order{which}." if others else f"{text}; it is the official files'."


def _gain_notes(rows: Rows, judged: Judged) -> list[str]:
    """How the gains are judged, in a line for each thing that the table shows of them."""
    gains = gains_on_student(rows, judged)
    notes = judgement_notes(rows, judged)
    if any(found.mcnemar for found in gains.values()):
        notes.append(
            f"{MCNEMAR}: the exact test on the test images, of each seed's run and the student's, without correction. "
            "It says nothing about other seeds."
        )
    untold = [name for name, found in gains.items() if len(found.mcnemar) < len(found.gains)]
    if untold:
        notes.append(
            f"No test against the student: {', '.join(untold)}; results must tell which of the same images were right."
        )
    return notes


def judgement_notes(rows: Rows, judged: Judged, label: Callable[[str], str] = str) -> list[str]:
    """How all differences of a table are judged, and what so few seeds can show. label: a row's name in the table."""
    found, count = list(judged.values()), len({frozenset(pair) for pair in judged})
    notes = [OVER_SEEDS] * any(each.over_seeds for each in found)
    if any(each.over_seeds and len({*map(len, (rows[pair[0]], rows[pair[1]]))}) > 1 for pair, each in judged.items()):
        notes.append(
            "Not every row has every seed: differences are by least squares, in which all rows tell what a seed is "
            "worth, so they need not be those of the means or of single runs."
        )
    if any(each.interval and not each.over_seeds for each in found):
        notes.append(OVER_IMAGES)
    if any(each.adjusted is not None for each in found):
        notes.append(
            "p: that there is no difference, by the t test over seeds or, if that is larger, by the sign test over "
            "test images (an image counts for the row that gets it right in more of the seeds), after Holm's "
            f"correction over all {count} differences compared here. Beyond noise: p is under {LEVEL:g}."
        )
    groups = linked(rows, judged)
    for group in groups:
        of = f"Of {', '.join(map(label, group))}: " * (len(groups) > 1)
        notes += [of + note for note in _spread_notes(group, judged, count, label)]
    teachers = {run.teacher["sha256"] for group in groups for run in group.runs() if run.teacher}
    if len(teachers) == 1:
        notes.append(
            "All of it is of one teacher: the intervals do not say how far another teacher would move the differences."
        )
    return notes


def _spread_notes(group: Rows, judged: Judged, count: int, label: Callable[[str], str]) -> list[str]:
    """The spread of rows that are compared with each other, what their seeds can show, and which row's is another."""
    spread = Blocks(group).spread
    if not spread:
        return ["One seed: no difference, however large, can be shown to be one of methods."] if len(group) > 1 else []
    notes = [f"One run's spread over seeds: {spread.deviation:.2f} points, with {spread.freedom} degrees of freedom."]
    found = [each for pair, each in judged.items() if pair[0] in group and each.spread == spread]
    error = min((each.error for each in found), default=0)
    if error:
        seeds = max(len(each.gains) for each in found)
        smallest = smallest_to_find(error, spread.freedom, count)
        chance = chance_to_find(1.0, error, spread.freedom, count)
        notes[0] += (
            f" With it, and {seeds} seed{'s' * (seeds > 1)} a row, a true difference is found beyond noise in "
            f"{100 * POWER:.0f} % of tables if it is {smallest:.2f} points, in {100 * chance:.0f} % if it is 1 point."
        )
    if (furthest := uneven(group)) and furthest[1] < UNEVEN:
        name, p = furthest
        notes.append(
            f"**The runs of {label(name)} lie further apart than other rows'** (Cochran's C, p {p_value(p)}): by the "
            "common spread its intervals are too narrow"
            + ", so it is judged by the paired t test, where that is less sure" * (p < LEVEL)
            + "."
        )
    return notes


def _held_out_notes(rows: Rows) -> list[str]:
    """Whether the rows trained on all training images."""
    by_count: dict[int, list[str]] = {}
    for name, seeds in rows.items():
        for count in dict.fromkeys(run.data["val_images"] for run in seeds.values()):
            by_count.setdefault(count, []).append(name)
    data = rows.any_run.data
    total = data["train_images"] + data["val_images"]
    if list(by_count) == [0]:
        return [f"All rows trained on all {total:,} training images."]
    who = {count: ", ".join(names) if len(by_count) > 1 else "all rows" for count, names in by_count.items()}
    notes = [
        f"Held out: {count:,} of {total:,} training images ({who[count]})."
        if count
        else f"None held out: {who[count]}."
        for count in sorted(by_count, reverse=True)
    ]
    return [*notes, "val loss (mean CE) and val top-1: of the held-out images after the last epoch."]


def _unlike_notes(rows: Rows) -> list[str]:
    """One note for each thing, none of its recipe, that not all students were trained with alike: which had what."""
    notes = []
    for what, told in ALIKE.items():
        by_value: dict[str, list[str]] = {}
        for name in rows.students:
            for value in dict.fromkeys(told(run) for run in rows[name].values()):
                if value is not None:
                    by_value.setdefault(value, []).append(name)
        if len(by_value) > 1:
            which = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
            notes.append(f"**Not the same {what} in all rows**, which they differ by as well: {which}.")
    if mixed := [name for name in rows if otherwise(rows[name], rows[name], SETUP | LENGTH)]:
        notes.append(f"**Not trained alike in all of its own seeds: {', '.join(mixed)}.** The mean tells nothing.")
    pairs = [pair for pair in student_pairs(rows) if not {*mixed} & {*pair}]
    if others := [name for name, student in pairs if "epochs" in unlike(rows, name, student)]:
        notes.append(f"**Not trained as long as the student it is compared with: {', '.join(others)}.**")
    return notes


def departures(run: Result) -> list[str]:
    """In what the run departs from its row of recipes.py, which is the reference's where the reference has it."""
    found = []
    if run.job in RECIPES:
        row = described(RECIPES[run.job])
        pairs = [
            (name, run.recipe.get(name), value) for name, value in row.items() if name not in ("job", "checkpoint")
        ]
        found += [f"{name} {here} instead of {there}" for name, here, there in pairs if here != there]
        if run.name != run.job:  # else what the row does not spell is its loss's default
            found += [f"{name} {value}" for name, value in run.recipe.items() if name not in row and value is not None]
    if run.augment:
        found.append("augmented images")
    teacher = run.recipe["network"] == "teacher"
    if run.weights not in (None, "imagenet" if teacher else "none"):
        usual = "imagenet" if teacher else "random ones"
        found.append(
            f"a {'teacher' if teacher else 'student'} that starts from the weights {run.weights} instead of {usual}"
        )
    if run.warm_start:
        anew = "a fresh optimiser" + " and what its loss learns begun anew" * bool(run.extra_parameters)
        found.append(f"a start from a finished run of {run.warm_start.get('epochs')} epochs, with {anew}")
    return found


def _departure_notes(rows: Rows) -> list[str]:
    """One note for each way of departing from the reference, with the rows that do; what runs with own names are."""
    jobs: dict[str, list[str]] = {}
    notes = []
    for name, seeds in rows.items():
        ways: dict[str, list[int]] = {}
        for seed, run in seeds.items():
            ways.setdefault(", ".join(departures(run)), []).append(seed)
        for text, those in ways.items():
            label = name if len(ways) == 1 else f"{name} (seed {', '.join(map(str, those))})"
            if name in RECIPES:
                if text:
                    jobs.setdefault(text, []).append(label)
            else:
                notes.append(f"{label} is {_described(rows[name][those[0]], text)}.")
    departed = [f"Not the reference's recipe: {', '.join(names)} ran with {text}." for text, names in jobs.items()]
    if rows.any_run.dataset == "cifar100" and not rows.any_run.is_of_the_references_data:
        departed.append("Not the reference's data: that is 50,000 training and 10,000 test images of 32x32 pixels.")
    if departed:
        departed.append(
            "Figures of shortened or otherwise changed runs, and of students of such a teacher, do not compare with "
            "the reference."
        )
    return notes + departed


def _described(run: Result, departures: str) -> str:
    """What a run with a name of its own is, in words."""
    if run.job in RECIPES:
        return f"{run.job} with {departures}" if departures else f"{run.job} as recipes.py has it"
    recipe = ", ".join(f"{name} {value}" for name, value in run.recipe.items() if name not in ("job", "checkpoint"))
    return f"no row of recipes.py; it ran with {', '.join([recipe, *filter(None, [departures])])}"


def comma_separated(rows: Rows) -> str:
    """results.csv: one line for each run, nothing averaged."""
    return as_csv([_flat(run) for run in rows.runs()])


def _flat(run: Result) -> dict[str, Any]:
    return {
        "job": run.job,
        "name": run.name,
        "seed": run.seed,
        "dataset": run.dataset,
        **{name: run.test[name] for name in ("top1", "top5", "test_loss", "mean_ce")},
        "val_images": run.data["val_images"],
        **{name: run.epochs[-1].get(name) for name in ("val_loss", "val_top1")},
        "epochs": run.recipe["epochs"],
        "precision": run.precision,
        "device": run.device,
        "teacher_top1": run.teacher_top1,
        **{name: value for name, value in run.recipe.items() if name not in ("job", "checkpoint")},
    }
