"""Runs side by side: what settings differ, their figures, and on which images they disagree."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy

from report.results import Result
from report.statistics import discordant, holm, mcnemar, newcombe, same_images
from util.runstate import flat

# What a result tells besides its settings: figures, names, and the command, whose flags are the settings.
NO_SETTINGS = {
    *("name", "teacher_top1", "epochs", "test", "seconds", "images_per_second"),
    *("checkpoint", "checkpoint_sha256", "recipe.job", "recipe.checkpoint", "command", "torchrun", "stretches"),
}
FIGURES: dict[str, Callable[[Result], str]] = {
    "top-1, %": lambda run: f"{run.test['top1']:.2f}",
    "top-5, %": lambda run: f"{run.test['top5']:.2f}",
    "Test Loss": lambda run: f"{run.test['test_loss']:.8f}",
    "mean cross-entropy": lambda run: f"{run.test['mean_ce']:.4f}",
    "test images": lambda run: f"{run.data['test_images']:,}",
}
LONGEST = 40  # characters of a cell
DIGEST = 10  # of them, of a digest

Runs = dict[str, Result]  # by what a run is called here


class Line(NamedTuple):
    """A line of the table: its title, and a cell for each run."""

    title: str
    cells: list[str]


def text(runs: Runs) -> str:
    """The runs as a table with a column each; the first is the one that the others are held against."""
    first = next(iter(runs))
    sections = {
        "settings that differ": _settings(runs),
        "figures": [Line(title, [of(run) for run in runs.values()]) for title, of in FIGURES.items()],
        f"against {first}, image by image": _pairs(runs),
    }
    lines = [line for part in sections.values() for line in part]
    left = max(len(line.title) for line in lines) + 2
    widths = [max(len(cells[i]) for cells in [list(runs), *(line.cells for line in lines)]) for i in range(len(runs))]

    def row(title: str, cells: list[str]) -> str:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([f"{title:<{left}}", *aligned]).rstrip()

    shown = [row("", list(runs))]
    for heading, part in sections.items():
        if part:
            shown += ["", heading, *(row(f"  {line.title}", line.cells) for line in part)]
    return "\n".join(shown)


def _settings(runs: Runs) -> list[Line]:
    """A line for each setting that is not the same in all; what a run's result does not tell counts as none."""
    flattened = [flat({**asdict(run), "test": None}) for run in runs.values()]
    names = [name for name in dict.fromkeys(name for values in flattened for name in values) if name not in NO_SETTINGS]
    found = {name: [values.get(name) for values in flattened] for name in names}
    return [
        Line(name, [_cell(name, value) for value in values])
        for name, values in found.items()
        if any(value != values[0] for value in values)
    ]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    longest = DIGEST if name.endswith(("sha256", "fingerprint")) else LONGEST
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def _pairs(runs: Runs) -> list[Line]:
    """Each run against the first on the same images: empty where that can be said of none."""
    (first, ours), *others = runs.items()
    pairs = {name: (run.right, ours.right) for name, run in others if same_images(run, ours)}
    if not pairs:
        return []
    ps = {name: mcnemar(*discordant(*pair)) for name, pair in pairs.items()}
    lines = {
        "points of top-1": lambda run, base: f"{100 * (run.mean() - base.mean()):+.2f}",
        "95 % interval, over test images": lambda run, base: "{:+.2f} to {:+.2f}".format(*newcombe(run, base)),
        "images that it alone got right": lambda run, base: f"{discordant(run, base)[0]:,}",
        f"images that {first} alone got right": lambda run, base: f"{discordant(run, base)[1]:,}",
    }
    found = [Line(title, [of(*pairs[name]) if name in pairs else "-" for name in runs]) for title, of in lines.items()]
    found.append(Line("p of McNemar's exact test", [_p(ps.get(name)) for name in runs]))
    if len(ps) > 1:
        adjusted = dict(zip(ps, holm(list(ps.values())), strict=True))
        found.append(Line(f"the same, by Holm for {len(ps)} tests", [_p(adjusted.get(name)) for name in runs]))
    return found


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def unpaired(runs: Runs) -> list[str]:
    """For each run that can't be held against the first image by image, a line that says why."""
    (first, ours), *others = runs.items()
    reasons = []
    for name, run in others:
        if not same_images(run, ours):
            untold = [told for told, result in ((first, ours), (name, run)) if result.right is None]
            reason = f"{untold[0]} does not tell which images it got right" if untold else "other test images"
            reasons.append(f"{first} and {name} can't be compared image by image: {reason}")
    return reasons


def disagreement(rights: numpy.ndarray, most: int) -> tuple[numpy.ndarray, int]:
    """The images on which the runs differ most, and how many such there are in all.

    rights: of each run and image, whether it was right, booleans (runs, images). They differ most where they are parted
    most evenly: of two runs, where one is right and the other wrong. Of more than `most` images, so many at even
    distances are taken; images that the same runs got right stand together.
    """
    right = rights.sum(0)
    split = numpy.minimum(right, len(rights) - right)
    if split.max() == 0:
        return numpy.empty(0, int), 0
    found = numpy.flatnonzero(split == split.max())
    found = found[numpy.lexsort(~rights[::-1, found])]
    taken = numpy.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return found[taken], len(found)
