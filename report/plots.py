"""The plots, PNGs of 1200 pixels' width: top-1 of each row, the training's curves, a sheet of images."""

import io
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy

from recipes import RECIPES
from report.results import CHOSEN_BY_TEST, CHOSEN_NOTE, Result, Rows, data_title, length, marked
from report.statistics import Interval, noise, own_intervals
from report.suite import Suite
from util.text import printable

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
BLUE, RED, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
# Families of rows by (network, soft loss): a colour and a mark each, shades and line styles tell their rows apart.
FAMILIES = {
    ("teacher", None): (ORANGE, "P"),
    ("student", None): (BLACK, "s"),
    ("student", "kd"): (BLUE, "o"),
    ("feature_student", "kd"): (GREEN, "^"),
    ("feature_student", "mse"): (RED, "v"),
}
OTHER_COLOURS = [PURPLE, SKY, "#7f7f7f", "#8c6d31", BLUE, GREEN, RED, ORANGE]
OTHER_MARKS = ["X", "p", "h", "*", "d", "8", "H", "P"]
LINE_STYLES = ["-", "--", "-.", ":"]

# Where a point's name may stand, in points of type from the point, the nearest first.
NAME_OFFSETS = [
    (round(r * math.cos(k * math.pi / 6)), round(r * math.sin(k * math.pi / 6)))
    for r in (14, 24, 36, 50, 66, 84, 104, 126, 150, 176)
    for k in range(12)
]
NEAR = 24  # so near a name needs no line to its point

LONGEST_NAME = 30  # characters; a longer one would leave no room for the plot
LONGEST_TITLE = 100  # characters of a line
ACROSS = 8  # images of a sheet


class Look(NamedTuple):
    """How a row is drawn."""

    colour: tuple[float, float, float]
    mark: str
    style: str


def top1_plot(rows: Rows) -> bytes:
    """top1.png: each row's mean top-1 with its 95 % interval, its seeds as dots, teacher and student as lines.

    The axis shows the rows that lie together; one that is far from them is named at the edge, with its figure.
    """
    figure = _figure(height=2.2 + 0.42 * len(rows))
    axes = figure.add_subplot()
    low, high = _shown_range(rows)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    looks = _looks(rows)
    intervals = own_intervals(rows)
    for y, name in enumerate(rows):
        if low <= rows.top1(name) <= high:
            _draw_row(axes, rows, name, y, looks[name], intervals[name])
        else:
            _draw_far(axes, rows.top1(name), y, (low, high), looks[name].colour)
        reference = _reference(rows, name)
        if reference is not None and low <= reference <= high:
            axes.plot(reference, y, "D", color="white", markeredgecolor="black", markersize=7, zorder=5)
        axes.text(1.01, y, f"{rows.top1(name):.2f}", transform=axes.get_yaxis_transform(), va="center")
    _draw_baselines(axes, rows, (low, high), looks)
    axes.set_yticks(range(len(rows)), [marked(_short(name)) for name in rows])
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(_marked(rows, "top-1 on the test images, %"))
    axes.set_title(_title(rows, "Top-1"), pad=26)
    figure.legend(handles=_top1_legend(rows, (low, high)), loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def sheet(
    images: numpy.ndarray, classes: Sequence[str], rights: numpy.ndarray, names: Sequence[str], title: str
) -> bytes:
    """A sheet of images: above each its true class and, by their letters, the runs that got it right.

    images: uint8 (N, H, W, 3). classes: of each its name. rights: booleans (runs, N). names: of the runs.
    """
    letters = [chr(ord("A") + i) for i in range(len(names))]
    down = -(-len(images) // ACROSS)
    figure = _figure(height=1.1 + 0.2 * len(names) + 1.9 * down)
    legend = "\n".join(f"{letter}  {_plain(name)}" for letter, name in zip(letters, names, strict=True))
    figure.suptitle(f"{_plain(title)}\n{legend}", x=0.01, ha="left", fontsize=11)
    palette = {}  # a colour for each set of runs that are right
    for place, (image, name, right) in enumerate(zip(images, classes, rights.T, strict=True), 1):
        axes = figure.add_subplot(down, ACROSS, place)
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        who = " ".join(letter for letter, was in zip(letters, right, strict=True) if was)
        colour = palette.setdefault(who, OTHER_COLOURS[len(palette) % len(OTHER_COLOURS)])
        axes.set_title(f"{_plain(_cut(name, 18))}\nright: {who}", fontsize=9, color=colour)
    return _png(figure)


def _draw_row(axes, rows: Rows, name: str, y: int, look: Look, interval: Interval) -> None:
    runs, colour = list(rows[name].values()), look.colour
    low, high = interval
    several = len(runs) > 1
    axes.plot([low, high], [y, y], color=colour, linewidth=3.5 if several else 1.2, solid_capstyle="butt", zorder=2)
    if several:
        beneath = [y + 0.27] * len(runs)  # where no mark hides them
        axes.plot([run.test["top1"] for run in runs], beneath, ".", color=colour, markersize=6, zorder=4)
    axes.plot(rows.top1(name), y, look.mark, color=colour, markeredgecolor="white", markersize=10, zorder=3)


def _draw_far(axes, value: float, y: int, shown: Interval, colour: tuple) -> None:
    """An arrow at the edge beyond which the row lies."""
    left = value < shown[0]
    axes.plot(shown[not left], y, "<" if left else ">", color=colour, markersize=11, clip_on=False, zorder=4)
    place = {"xytext": (12 if left else -12, 0), "textcoords": "offset points", "va": "center", "color": colour}
    axes.annotate("off this axis", (shown[not left], y), ha="left" if left else "right", **place)


def _draw_baselines(axes, rows: Rows, shown: Interval, looks: dict[str, Look]) -> None:
    """The teacher and the student as lines, named above the axes, each on the side away from the other."""
    drawn = _baselines(rows)
    values = {label: (rows.top1(name), looks[name].colour) for label, name in drawn.items()}
    if "teacher" not in values:
        values |= {f"teacher, {top1:.2f}": (top1, ORANGE) for top1 in _own_teachers(rows)}
    lines = {label: value for label, (value, _) in values.items() if shown[0] <= value <= shown[1]}
    # Teachers that have no row of their own, where their figures would stand.
    far = [label.removeprefix("teacher, ") for label in values if label.startswith("teacher, ") and label not in lines]
    if far:
        text = f"teacher, {' and '.join(far)}, off this axis"
        at_right = all(value < (shown[0] + shown[1]) / 2 for value in lines.values())
        at, side = (1, "right") if at_right else (0, "left")
        axes.text(at, 1.01, text, transform=axes.transAxes, ha=side, va="bottom")
    for label, (value, colour) in values.items():
        where = axes.get_xaxis_transform()
        if label not in lines:
            continue
        leftmost = len(lines) > 1 and label == min(lines, key=lines.get)
        rightmost = len(lines) > 1 and not leftmost
        side = "right" if leftmost else "left" if rightmost else "center"
        axes.axvline(value, color=colour, linestyle="--", linewidth=1.2, zorder=1)
        axes.text(value, 1.01, label, transform=where, ha=side, va="bottom", color=colour)


def _own_teachers(rows: Rows) -> list[float]:
    """The top-1 of the teachers that the rows learnt from, where none of these has a row."""
    there = any(map(rows.is_teacher, rows))
    return [] if there else sorted({run.teacher_top1 for run in rows.runs() if run.teacher_top1 is not None})


def _baselines(rows: Rows) -> dict[str, str]:
    """The rows "teacher" and "student" or, where there is one teacher or one student alone by another name, that."""
    candidates = {
        "teacher": [name for name in rows if rows.is_teacher(name)],
        "student": [name for kind in rows.kinds for name in rows.plain_students(kind)],
    }
    chosen = {label: label if label in names else names[0] for label, names in candidates.items() if names}
    return {label: name for label, name in chosen.items() if name == label or len(candidates[label]) == 1}


def _top1_legend(rows: Rows, shown: Interval) -> list:
    """The kinds of marks that this plot has."""
    from matplotlib.lines import Line2D

    grey = {"color": "grey", "markersize": 7}
    several = [len(seeds) > 1 for name, seeds in rows.items() if shown[0] <= rows.top1(name) <= shown[1]]
    handles = []
    if any(several):
        handles.append(Line2D([], [], marker="o", linewidth=3.5, label="mean, 95 % interval over seeds", **grey))
        handles.append(Line2D([], [], marker=".", linestyle="", label="one seed", **grey))
    if not all(several):
        label = "one run, 95 % interval over test images (Wilson)"
        handles.append(Line2D([], [], marker="o", linewidth=1.2, label=label, **grey))
    references = {name: _reference(rows, name) for name in rows}
    epochs = {RECIPES[name].epochs for name, top1 in references.items() if top1 and shown[0] <= top1 <= shown[1]}
    if epochs:
        label = f"reference, {' or '.join(map(str, sorted(epochs)))} epochs, one run"
        look = {"color": "white", "markeredgecolor": "black"}
        handles.append(Line2D([], [], marker="D", linestyle="", label=label, **look))
    return handles


def _reference(rows: Rows, name: str) -> float | None:
    """The reference's top-1 of a row; None where there is none, or where these runs are not of the reference's data."""
    row = RECIPES.get(name)
    return row.reference.top1 if row and row.reference and rows.first(name).is_of_the_references_data else None


def _shown_range(rows: Rows) -> Interval:
    """The part of the axis of top-1 that has the rows that lie together, with their intervals.

    Students above them join them, as the best is what one looks for, and the others as long as none widens that part by
    more than six tenths. An interval may widen it at most to three times what means and seeds take: one of two seeds
    can be longer than all that the plot is to show.
    """
    students = rows.students or list(rows)
    middle = statistics.median(rows.top1(name) for name in students)
    distance = {name: abs(rows.top1(name) - middle) for name in rows}
    reach = max(noise(rows), 3 * statistics.median(distance[name] for name in students))
    for name in sorted(rows, key=distance.get):
        if distance[name] <= 1.6 * reach or (name in students and rows.top1(name) > middle):
            reach = max(reach, distance[name])
    near = [name for name in rows if distance[name] <= reach]
    points = [run.test["top1"] for name in near for run in rows[name].values()]
    points += [value for name in near if (value := _reference(rows, name)) is not None]
    every = own_intervals(rows)
    intervals = [every[name] for name in near]
    least, most = min(points), max(points)
    room = max(most - least, noise(rows))
    low = max(min(least, *(low for low, _ in intervals)), least - room)
    high = min(max(most, *(high for _, high in intervals)), most + room)
    margin = max(0.05 * (high - low), 0.1 * noise(rows), 0.1)
    return low - margin, high + margin


def curves_plot(rows: Rows) -> bytes:
    """curves.png: over the epochs, each row's training loss (its own objective), its top-1 and its alpha."""
    from matplotlib.ticker import MaxNLocator

    with_alpha = any("alpha" in epoch for run in rows.runs() for epoch in run.epochs)
    held_out = any("val_top1" in epoch for run in rows.runs() for epoch in run.epochs)
    heights = [3, 3, 1.6][: 2 + with_alpha]
    figure = _figure(height=max(9 + 2 * with_alpha, 3 + 0.25 * len(rows)))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    loss, top1, *alpha = panels
    for name, look in _looks(rows).items():
        look = look._replace(style="-") if held_out else look
        runs = list(rows[name].values())
        _draw(loss, runs, ["train_loss_over_batches", "train_loss"], look, label=marked(_short(name)))
        _draw(top1, runs, ["train_top1"], look)
        _draw(top1, runs, ["val_top1"], look._replace(style="--"))
        if alpha:
            _draw(alpha[0], runs, ["alpha"], look)
    if all(line.get_ydata().min() > 0 for line in loss.lines):
        _log_scale(loss)
    loss.set_ylabel("training loss, each row's own objective")
    top1.set_ylabel("top-1, %: training (solid), held-out images (dashed)" if held_out else "training top-1, %")
    if alpha:
        alpha[0].set_ylabel("alpha")
        alpha[0].set_ylim(-0.05, 1.05)
    drops = _drops(rows)
    for axes in panels:
        axes.grid(alpha=0.3)
        for epoch in drops:
            axes.axvline(epoch, color="grey", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
    panels[-1].set_xlabel(_marked(rows, "epoch" + "; grey: the learning rate drops" * bool(drops)))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # 1 alone, too
    figure.legend(loc="outside right upper", handlelength=3.5, frameon=False)
    loss.set_title(_title(rows, "Training" + ", means over seeds" * rows.have_several_seeds))
    return _png(figure)


def _log_scale(axes) -> None:
    """A log scale that says 0.1, not 10 to the -1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""  # it knows which of the ticks there is room for

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(Plain())


def _draw(axes, runs: list[Result], names: list[str], look: Look, label: str | None = None) -> None:
    """The curve of the first of these figures that all epochs of the runs have; none where there is no such."""
    name = next((name for name in names if all(name in epoch for run in runs for epoch in run.epochs)), None)
    if name:
        points = _mean_curve(runs, name)
        line = {"color": look.colour, "linestyle": look.style, "marker": look.mark, "markersize": 6, "linewidth": 1.6}
        line["markevery"] = -(-len(points) // 10)
        axes.plot(range(1, len(points) + 1), points, label=label, **line)


def _mean_curve(runs: Iterable[Result], name: str) -> list[float]:
    """The mean over runs, epoch by epoch, as far as the shortest goes."""
    curves = [[epoch[name] for epoch in run.epochs] for run in runs]
    return [statistics.mean(values) for values in zip(*curves, strict=False)]


def _drops(rows: Rows) -> list[float]:
    """Where the students' learning rate drops, halfway between two epochs; the teacher's own drops if it is alone.

    A cosine's falls at every step, which is no drop.
    """
    runs = [run for name in rows.students or rows for run in rows[name].values()]
    found = set()
    for run in (run for run in runs if run.recipe.get("schedule") != "cosine"):
        rates = [epoch.get("learning_rate") for epoch in run.epochs]
        found |= {i + 0.5 for i in range(1, len(rates)) if rates[i] != rates[i - 1]}
    return sorted(found)


def suite_plot(suite: Suite) -> bytes:
    """The plot of its name."""
    if suite.scheduled:
        return schedules_plot(suite)
    return cost_plot(suite) if suite.costs else top1_plot(suite)


def cost_plot(suite: Suite) -> bytes:
    """<suite>_cost.png: each student's top-1, with its noise, against a step's time beside kd's, where it is known."""
    figure = _figure(height=7)
    axes = figure.add_subplot()
    points = {name: (cost, suite.top1(name)) for name, cost in suite.costs.items()}
    for name, (x, y) in points.items():
        colour, marker = {suite.alone: (BLACK, "s"), suite.kd: (BLUE, "D")}.get(name, (GREEN, "o"))
        width = 3.5 if len(suite[name]) > 1 else 1.2
        look = {"color": colour, "elinewidth": width, "markersize": 9, "markeredgecolor": "white"}
        axes.errorbar(x, y, yerr=suite.noise(name), fmt=marker, **look)
    axes.margins(0.12)
    axes.set_xlim(0, 1.15 * max(suite.costs.values()))
    axes.grid(alpha=0.3)
    axes.set_xlabel(
        "\n".join(
            ["time of a step, kd's is 1; each loss measured alone, see benchmarks/RESULTS.md", *_noise_kinds(suite)]
        )
    )
    axes.set_ylabel("top-1 on the test images, %")
    for top1 in _own_teachers(suite):
        if axes.get_ylim()[0] <= top1 <= axes.get_ylim()[1]:
            axes.axhline(top1, color=ORANGE, linestyle="--", linewidth=1.2)
    axes.set_title(_title(suite, f"Accuracy against cost, {suite.name}"))
    marks = [(x, y, suite.noise(name)) for name, (x, y) in points.items()]
    _name_marks(figure, axes, dict(zip(map(suite.label, points), marks, strict=True)))
    return _png(figure)


def _noise_kinds(suite: Suite) -> list[str]:
    """What the bars of this suite are."""
    counts = [len(suite[name]) for name in suite.students]
    kinds = {"thick: ± the standard deviation over seeds": max(counts) > 1}
    kinds["thin: one run, ± the standard error over test images"] = min(counts) == 1
    return [words for words, there in kinds.items() if there]


def _name_marks(figure, axes, marks: dict[str, tuple[float, float, float]]) -> None:
    """Write each mark's name as near to it as it covers no mark, no bar and no other name. marks: x, y, half a bar."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed by pixels must not be moved afterwards
    frame, taken = axes.get_window_extent(), []
    for x, y, half in marks.values():
        (left, low), (_, middle), (_, high) = axes.transData.transform([(x, y - half), (x, y), (x, y + half)])
        taken += [Bbox([[left - 3, low], [left + 3, high]]), Bbox([[left - 7, middle - 7], [left + 7, middle + 7]])]
    for name, (x, y, _) in marks.items():
        for dx, dy in NAME_OFFSETS:
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            place = {"xytext": (dx, dy), "textcoords": "offset points"}
            text = axes.annotate(name, (x, y), va="center", ha=side, **place)
            box = text.get_window_extent()
            if frame.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                break
            text.remove()
        else:  # a plot so full that there is no room at all
            text = axes.annotate(name, (x, y), va="center", ha=side, **place)
        taken.append(box)
        if math.hypot(dx, dy) > NEAR:
            axes.annotate("", (x, y), arrowprops={"arrowstyle": "-", "color": "grey"}, **place)


def schedules_plot(suite: Suite) -> bytes:
    """<suite>_schedules.png: losses by schedules of alpha, in each cell top-1 and its noise.

    The colour is the difference to the same loss with a constant alpha; bold is beyond noise.
    """
    losses = suite.scheduled
    cells = {(loss, suite.alpha(name)): name for loss in losses for name in suite.of_loss(loss)}
    alphas = sorted({alpha for _, alpha in cells}, key=lambda alpha: (isinstance(alpha, str), alpha))
    compared = suite.to_constant()
    constants = [*filter(None, map(suite.constant, losses))]
    gains = dict.fromkeys(constants, 0.0) | {name: found.gain for name, found in compared.items()}
    bold = {name for name, found in compared.items() if found.beyond_noise}
    figure = _figure(height=2.2 + 0.9 * len(losses))
    axes = figure.add_subplot()
    values = [[gains.get(cells.get((loss, alpha)), math.nan) for alpha in alphas] for loss in losses]
    most = max([abs(value) for row in values for value in row if not math.isnan(value)], default=0) or 1
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for (loss, alpha), name in cells.items():
        text = f"{suite.top1(name):.2f}\n± {suite.noise(name):.2f}" + " (one run)" * (len(suite[name]) == 1)
        dark = abs(gains.get(name, 0)) > 0.6 * most
        look = {"color": "white" if dark else "black", "weight": "bold" if name in bold else "normal"}
        axes.text(alphas.index(alpha), losses.index(loss), text, ha="center", va="center", **look)
    axes.set_xticks(range(len(alphas)), [f"constant {a:g}" if not isinstance(a, str) else a for a in alphas])
    axes.set_yticks(range(len(losses)), losses)
    judged = any(found.beyond_noise is not None for found in compared.values())
    axes.set_xlabel("alpha, the weight of the hard labels" + "; bold: beyond noise against the constant" * judged)
    axes.set_title(_title(suite, f"Top-1 by loss and schedule, {suite.name}"))
    figure.colorbar(image, label="points more than\nwith a constant alpha")
    return _png(figure)


def _looks(rows: Rows) -> dict[str, Look]:
    """A look for each row: its family's colour and mark, and a shade and a line style of its own among them."""
    families: dict[tuple, list[str]] = {}
    for name in rows:
        recipe = rows.first(name).recipe
        families.setdefault((recipe["network"], recipe["soft"]), []).append(name)
    others = [family for family in families if family not in FAMILIES]
    more = {family: (OTHER_COLOURS[i % 8], OTHER_MARKS[i % 8]) for i, family in enumerate(others)}
    looks = {}
    for family, names in families.items():
        colour, mark = (FAMILIES | more)[family]
        for i, name in enumerate(names):
            shade = _shade(colour, 2 * i / (len(names) - 1) - 1 if len(names) > 1 else 0)
            looks[name] = Look(shade, mark, LINE_STYLES[i % len(LINE_STYLES)])
    return {name: looks[name] for name in rows}


def _shade(colour: str, lightness: float) -> tuple[float, float, float]:
    """The colour, from darker (-1) over itself (0) to lighter (1)."""
    from matplotlib.colors import to_rgb

    other, part = (1.0, 0.5 * lightness) if lightness > 0 else (0.0, -0.4 * lightness)
    return tuple((1 - part) * value + part * other for value in to_rgb(colour))


def _short(name: str) -> str:
    """The name; of a long one its beginning and its end."""
    return _plain(_cut(name, LONGEST_NAME))


def _cut(name: str, longest: int) -> str:
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")  # which would begin a formula


def _figure(height: float):
    """An empty figure, 1200 pixels wide; matplotlib is imported here, so that importing the report stays fast."""
    from matplotlib.figure import Figure

    return Figure(figsize=(12, height), dpi=100, layout="constrained")


def _png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _title(rows: Rows, what: str) -> str:
    check = " (a check of the pipeline, not a result)" * rows.are_a_check
    text = f"{_cut(data_title(rows.any_run), 60)}, {length(rows)}{check}"
    return _plain(f"{what}{': ' if len(what + text) < LONGEST_TITLE else chr(10)}{text}")


def _marked(rows: Rows, words: str) -> str:
    """An axis's words, with the note to the rows that have a mark."""
    return "\n".join([words, *[CHOSEN_NOTE] * bool(rows.keys() & CHOSEN_BY_TEST)])
