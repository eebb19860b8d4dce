"""SUITE.md: the losses of a suite beside each other, with what papers claim of them and with what they cost."""

import json
import statistics
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from recipes import RECIPES, described, under
from report.findings import p_value
from report.results import (
    SETUP,
    Claimed,
    Result,
    Rows,
    data_title,
    describe_data,
    epochs_of,
    length,
    made_by,
    made_on,
    otherwise,
    training_of,
)
from report.statistics import Comparison, Pair, binomial_error, judge
from report.table import MCNEMAR, gain_cell, judgement_notes, lines_as_table, spread

# The cost of each loss's step beside kd's, each measured alone; a run can't know whether it had its machine to itself.
COSTS = Path(__file__).resolve().parent.parent / "benchmarks" / "loss_cost.json"
# What a result's recipe tells besides the settings of its loss.
NO_SETTINGS = {*described(RECIPES["student"]), *described(under(RECIPES["student"], "benchmark"))}
# And of that what is of the loss and the networks.
OF_THE_LOSS = {"job", "checkpoint", "network", "arch", "soft", "alpha", "weight", "beta", "gamma"}


class Suite(Rows):
    """The runs of one suite: the teacher where it was trained with them, the student alone, kd, then the others."""

    @property
    def name(self) -> str:
        """By which the results tell it."""
        return self.any_run.suite

    @property
    def alone(self) -> str | None:
        """The row of the student that learns from no teacher; None where it did not run."""
        return next((name for name in self.students if not self.loss(name)), None)

    @property
    def kd(self) -> str | None:
        """The row of kd with a constant alpha; None where it did not run."""
        return self.constant("kd")

    def loss(self, name: str) -> str | None:
        """The loss that the row is distilled by."""
        return self.first(name).recipe["soft"]

    def alpha(self, name: str) -> float | str:
        """Its weight of the hard labels, or the name of its schedule."""
        return self.first(name).recipe["alpha"]

    def of_loss(self, loss: str) -> list[str]:
        """The rows that are distilled by the loss."""
        return [name for name in self.students if self.loss(name) == loss]

    def constant(self, loss: str) -> str | None:
        """The row of the loss with a constant alpha; None where it did not run."""
        return next((name for name in self.of_loss(loss) if not isinstance(self.alpha(name), str)), None)

    @cached_property
    def judged(self) -> dict[Pair, Comparison]:
        """All differences that the table shows, judged together."""
        constants = {loss: self.constant(loss) for loss in self.scheduled}
        pairs = [
            (name, other)
            for name in self.students
            for other in (self.alone, self.kd, constants.get(self.loss(name)))
            if other not in (None, name) and name != self.alone and not self.otherwise(name, other)
        ]
        return judge(self, pairs)

    def against(self, other: str | None) -> dict[str, Comparison]:
        """Each row that is compared with that one."""
        return {name: found for (name, baseline), found in self.judged.items() if baseline == other}

    def to_constant(self) -> dict[str, Comparison]:
        """Of losses that ran by several alphas: each row against the loss's own with a constant one."""
        pairs = {(name, self.constant(loss)): name for loss in self.scheduled for name in self.of_loss(loss)}
        return {pairs[pair]: found for pair, found in self.judged.items() if pair in pairs}

    def label(self, name: str) -> str:
        """The row in words, so many as tell it from the suite's others."""
        loss = self.loss(name)
        if self.is_teacher(name) or not loss:
            return "teacher" if self.is_teacher(name) else "student alone"
        return f"{loss}, {self.alpha(name)}" if len(self.of_loss(loss)) > 1 else loss

    @property
    def scheduled(self) -> list[str]:
        """The losses that have several rows, by several alphas."""
        losses = dict.fromkeys(filter(None, map(self.loss, self.students)))
        return [loss for loss in losses if len(self.of_loss(loss)) > 1]

    @property
    def plot(self) -> str:
        """The file of its plot: losses by schedules; else accuracy against cost, or alone where no cost is known."""
        return f"{self.name}_{'schedules' if self.scheduled else 'cost' if self.costs else 'top1'}.png"

    def claimed(self, name: str) -> Claimed | None:
        """What a paper says of the row; None where it says nothing, or where its data are others."""
        run = self.first(name)
        return run.claimed if run.is_of_cifar100s_shape else None

    @property
    def costs(self) -> dict[str, float]:
        """A step's time of each student's row, as a ratio to kd's, where it was measured for such a student."""
        found = {name: _cost(self.first(name), self.loss(name)) for name in self.students}
        return {name: cost for name, cost in found.items() if cost}

    def otherwise(self, name: str, other: str) -> list[str]:
        """What but for the loss the two rows were trained with that is not the same, or not in all seeds, in words."""
        ours, theirs = self[name], self[other]
        return otherwise(ours, theirs, TRAINED_WITH) + ["seeds"] * (not ours.keys() & theirs.keys())

    @property
    def mixed(self) -> list[str]:
        """The rows whose own seeds were not trained alike."""
        return [name for name in self if self.otherwise(name, name)]

    def noise(self, name: str) -> float:
        """Of the row's top-1, in points: its standard deviation over seeds; of one run its error over test images."""
        values = [run.test["top1"] for run in self[name].values()]
        if len(values) > 1:
            return statistics.stdev(values)
        return binomial_error(values[0], self.first(name).data["test_images"])


@cache
def measured_costs() -> dict[str, Any]:
    """What benchmarks/loss_cost.py measured; nothing where that is not beside the report."""
    return json.loads(COSTS.read_text()) if COSTS.exists() else {"pair": "", "ratio": {}}


def _cost(run: Result, loss: str | None) -> float | None:
    size, measured = run.data["image_size"], measured_costs()
    such = f"{Rows.network(run)}, {size}x{size} pixels, {run.data['classes']} classes, "
    such += f"batches of {run.recipe['batch_size']}"
    return measured["ratio"].get(loss or "none") if measured["pair"].endswith(f" to {such}") else None


def _training(run: Result) -> str:
    recipe = run.recipe
    way = f"{training_of(run)}, {epochs_of(run)} epochs, batches of {recipe['batch_size']}"
    return f"{way}, learning rate {recipe['learning_rate']:g}" + ", random crop and flip" * run.augment


# What rows must have in common to be compared, besides their seeds and, where both have one, the teacher.
TRAINED_WITH: dict[str, Callable[[Result], Any]] = {
    "training": lambda run: str([run.recipe.get(name) for name in sorted(NO_SETTINGS - OF_THE_LOSS)]),
    "network": Rows.network,
    **SETUP,
}


def suites_of(rows: Rows) -> list[Suite]:
    """The rows that belong to suites, a Suite for each."""
    found: dict[str, Suite] = {}
    for name, seeds in rows.items():
        if suite := rows.first(name).suite:
            found.setdefault(suite, Suite())[name] = seeds
    return [_in_order(found[suite]) for suite in sorted(found)]


def _in_order(suite: Suite) -> Suite:
    def place(name: str) -> tuple:
        alpha, first = suite.alpha(name), (suite.is_teacher(name), name == suite.alone, suite.loss(name) == "kd")
        return *(not here for here in first), suite.loss(name), isinstance(alpha, str), alpha

    return Suite({name: suite[name] for name in sorted(suite, key=place)})


def markdown(suites: Iterable[Suite]) -> str:
    """SUITE.md."""
    return "\n\n".join(["# Losses side by side", *(_section(suite.in_markdown()) for suite in suites)]) + "\n"


def _section(suite: Suite) -> str:
    parts = [
        f"## {suite.name}: {data_title(suite.any_run)}, {length(suite)}",
        _heading(suite),
        _table(suite),
        "\n".join(f"- {note}" for note in _notes(suite)),
    ]
    parts.append(f"![{suite.name}]({suite.plot})")
    if suite.are_a_check:
        parts.insert(1, "**This is a check of the pipeline, not a result.**")
    return "\n\n".join(parts)


def _heading(suite: Suite) -> str:
    runs = [run for name in suite.students for run in suite[name].values()]
    facts = {
        "Data": [describe_data(suite.any_run)],
        "Student": [run.recipe.get("arch") or run.recipe["network"] for run in runs],
        "Training": [_training(run) for run in runs],
        "Top-1 of the teacher distilled from": [f"{run.teacher_top1:.2f}" for run in runs if run.teacher_top1],
        **made_on([*suite.runs()], lambda run: run.machine),
    }
    lines = [f"- {name}: {'; '.join(dict.fromkeys(values))}" for name, values in facts.items() if values]
    return "\n".join(lines) + f"\n\n{made_by(suite.runs())}"


def _table(suite: Suite) -> str:
    columns = {
        "to the student alone": suite.against(suite.alone),
        "to kd": suite.against(suite.kd),
        "to its constant": suite.to_constant(),
    }
    lines = [_cells(suite, name, {title: found.get(name) for title, found in columns.items()}) for name in suite]
    return lines_as_table(lines, always=["loss", "top-1"])


def _cells(suite: Suite, name: str, compared: dict[str, Comparison | None]) -> dict[str, str]:
    """The cells of a row under their titles; a column that is empty in all rows is not shown."""
    runs, claimed = list(suite[name].values()), suite.claimed(name)
    cost = suite.costs.get(name)
    return {
        "loss": suite.label(name),
        "claimed": _claim(claimed) if claimed else "",
        "top-1": spread([run.test["top1"] for run in runs], ".2f"),
        "seeds": str(len(runs)),
        "epochs": _epochs(suite, name),
        "to the claim": f"{suite.top1(name) - claimed['top1']:+.2f}" if claimed and name not in suite.mixed else "",
        **{title: _difference(found, len(runs)) for title, found in compared.items()},
        "cost, kd's is 1": f"{cost:.2f}" if cost else "",
        "parameters of the loss": f"{runs[0].extra_parameters:,}" if suite.loss(name) else "",
    }


def _claim(claimed: Claimed) -> str:
    return f"{claimed['top1']:.2f}{', best epoch' * claimed.get('best', False)} ({claimed['source']})"


def _is_shorter(suite: Suite, name: str) -> bool:
    claimed = suite.claimed(name)
    return claimed is not None and any(run.recipe["epochs"] < claimed["epochs"] for run in suite[name].values())


def _epochs(suite: Suite, name: str) -> str:
    return ", ".join(dict.fromkeys(map(epochs_of, suite[name].values())))


def _difference(found: Comparison | None, seeds: int) -> str:
    if found is None:
        return ""
    cell = gain_cell(found, seeds)
    if found.adjusted is not None:
        return f"{cell}, p {p_value(found.adjusted)}"
    if found.over_seeds:
        return cell
    return cell + "".join(f", McNemar p {p_value(p)}" for p in found.mcnemar.values())


def _notes(suite: Suite) -> list[str]:
    """What one must know to read the table."""
    notes = [
        "top-1: percent of the test images after the last epoch; ±: the sample standard deviation over the seeds.",
        *["to: the difference to that row, in points of top-1."] * bool(suite.judged),
        *judgement_notes(suite, suite.judged, suite.label),
    ]
    if any(found.mcnemar and not found.over_seeds for found in suite.judged.values()):
        notes.append(f"{MCNEMAR}: the exact test on the test images, without correction.")
    if suite.to_constant():
        notes.append("to its constant: to the row of the same loss with a constant alpha.")
    if claims := [*filter(None, map(suite.claimed, suite))]:
        notes.append("claimed: top-1 that the paper gives for these two networks on CIFAR-100.")
        if any(claim.get("best") for claim in claims):
            notes.append("best epoch: claimed of the epoch that is best on the test images; measured of the last.")
    if shorter := [suite.label(name) for name in suite if _is_shorter(suite, name)]:
        notes.append(
            f"**Trained for fewer epochs than what is claimed: {', '.join(shorter)}.** That costs accuracy, and not "
            "each loss the same; such figures do not test the claim."
        )
    if suite.mixed:
        mixed = ", ".join(map(suite.label, suite.mixed))
        notes.append(f"**Not trained alike in all of its own seeds: {mixed}.** The mean over these tells nothing.")
    kd = "kd with a constant alpha" if suite.of_loss("kd") and not suite.kd else "kd"
    baselines = {"the student alone": suite.alone, kd: suite.kd}
    notes += [f"Nothing is compared with {words}, which did not run." for words, row in baselines.items() if not row]
    for words, row in baselines.items():
        ways = {name: suite.otherwise(name, row) for name in suite.students if row}
        if others := [f"{suite.label(name)} ({', '.join(way)})" for name, way in ways.items() if way]:
            notes.append(f"Not compared with {words}, as they were trained otherwise: {', '.join(others)}.")
    return [
        *notes,
        *_cost_notes(suite),
        "parameters of the loss: learnt with the student's and, simkd's apart, no part of it. What a loss remembers is "
        "not counted.",
        f"Settings: {'; '.join(dict.fromkeys(_settings(suite, name) for name in suite.students if suite.loss(name)))}.",
    ]


def _cost_notes(suite: Suite) -> list[str]:
    told = "Runs can't know whether they had the machine to themselves, so their seconds and memory are in no table."
    if not suite.costs:
        return [told]
    pair, device = (measured_costs()[name] for name in ("pair", "device"))
    return [
        "cost: the time of a whole step as a ratio to kd's, each loss measured alone with the teacher's outputs "
        f"remembered, by benchmarks/loss_cost.py: {pair}; {device}. Where images are augmented a loss of feature maps "
        f"also runs the teacher, which is not counted. {told}"
    ]


def _settings(suite: Suite, name: str) -> str:
    """The row's loss with its settings, and with alpha where the row's label does not have it."""
    recipe, loss = suite.first(name).recipe, suite.loss(name)
    values = {} if loss in suite.scheduled else {"alpha": recipe["alpha"]}
    values |= {key: value for key, value in recipe.items() if key not in NO_SETTINGS}
    if recipe.get("weight") not in (None, 1):
        values["weight"] = recipe["weight"]
    return f"{loss} ({', '.join(f'{key} {value}' for key, value in values.items())})" if values else loss
