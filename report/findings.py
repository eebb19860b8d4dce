"""Plain sentences that follow from figures alone: what the rows show, and what they say of the reference's claims."""

from typing import NamedTuple

from recipes import RECIPES
from report.results import SETUP, Rows, full_epochs, marked, otherwise
from report.statistics import (
    LEVEL,
    MARGIN,
    Comparison,
    Pair,
    fewest_images,
    gains_on_student,
)

Judged = dict[Pair, Comparison]

FEW_IMAGES = 1000  # with fewer test images, a difference that a paper would report is a handful of them


class Claim(NamedTuple):
    """A claim of the reference. verdict: "yes", "no" or "not settled"; evidence: each difference, a line each."""

    text: str
    verdict: str
    evidence: list[str]


def findings(rows: Rows, judged: Judged) -> list[str]:
    """The best student row, its gain and what is beyond noise; where there are few test images, what they can show.

    Students of several networks or trainings are told of apart. judged: all comparisons of the table, see `judge`.
    """
    if not rows.students:
        return ["Only the teacher ran: there is nothing to compare it with."]
    gains, kinds = gains_on_student(rows, judged), rows.kinds
    if len(kinds) == 1:
        (facts,) = (_best_facts(rows, kind, gains, "that ran") for kind in kinds)
    else:
        facts = [" ".join(_best_facts(rows, kind, gains, f"of {', '.join(kind)}")) for kind in kinds]
    return facts + _beyond_facts(gains) + _few_images_facts(rows, judged)


def _best_facts(rows: Rows, kind: tuple[str, str], gains: dict[str, Comparison], which: str) -> list[str]:
    """The best of the students of one network and training, and its gain. which: the words for them."""
    students, alone = rows.kinds[kind], rows.plain_students(kind)
    best = max(students, key=rows.top1)
    facts = [f"Best of the students {which} ({len(students)}) by mean top-1: {best}, {rows.top1(best):.2f} %."]
    if not alone:
        facts.append("The student on hard labels alone did not run, so there is no gain to tell.")
    elif students == alone:
        facts.append("No distilled row ran, so there is no gain to tell.")
    elif best in alone:
        facts.append("No distilled row is above the student on hard labels alone.")
    elif rows.student_of(kind, best) is None:
        facts.append("No student on hard labels alone was trained as it was, so there is no gain to tell.")
    elif best not in gains:
        facts.append("It has no seed in common with the student, so there is no gain to tell.")
    else:
        facts += _gain_facts(gains[best])
        if len(students) > 2:
            facts.append("It is the best of several on the same test images, which flatters its gain a little.")
    return facts


def _gain_facts(found: Comparison) -> list[str]:
    facts = [f"Its gain on the student in top-1 is {difference(found)}{_judgement(found)}."]
    if not found.over_seeds:
        facts.append("That is one seed: how far another seed would move it is not known from these runs.")
    elif len(found.gains) == 1:
        facts.append("That is one seed: how far another would move it is taken from the seeds of other rows.")
    else:
        facts.append(f"Seed by seed it is {', '.join(f'{value:+.2f}' for value in found.gains.values())}.")
    return facts


def _judgement(found: Comparison) -> str:
    if found.beyond_noise is None:
        return ""
    return f", {'beyond' if found.beyond_noise else 'not beyond'} noise (p {p_value(found.adjusted)} after Holm)"


def _beyond_facts(gains: dict[str, Comparison]) -> list[str]:
    told = [name for name, found in gains.items() if found.beyond_noise is not None]
    above = [name for name in told if gains[name].beyond_noise and gains[name].gain > 0]
    below = [name for name in told if gains[name].beyond_noise and gains[name].gain < 0]
    others = [marked(name) for name in told if name not in above + below]
    parts = {"Above the student beyond noise": above, "Below the student beyond noise": below}
    facts = [f"{words}: {', '.join(map(marked, names)) or 'none'}." for words, names in parts.items()] if told else []
    return facts + [f"Not told from the student by these test images and seeds: {', '.join(others)}."] * bool(others)


def _few_images_facts(rows: Rows, judged: Judged) -> list[str]:
    """What so few test images can show at best; nothing where there are many."""
    n = rows.any_run.data["test_images"]
    if n >= FEW_IMAGES:
        return []
    count = max(1, len({frozenset(pair) for pair in judged}))
    alone, first = fewest_images(1), fewest_images(count)
    text = (
        f"{n:,} test images are few: one image is {100 / n:.2f} points. Two rows can't be told apart by less than "
        f"{alone} images, {100 * alone / n:.2f} points, even where all images on which they differ are for one of them"
    )
    if first > alone:
        text += f"; as one of {count} differences, by less than {first}, {100 * first / n:.2f} points"
    return [f"{text}. Most differences that a method makes are smaller: such figures check the pipeline."]


def difference(found: Comparison) -> str:
    """The difference in points with its interval, in words."""
    if found.interval is None:
        return f"{found.gain:+.2f} points"
    low, high = found.interval
    what = "95 % interval" if found.over_seeds else "95 % interval over test images, one seed,"
    return f"{found.gain:+.2f} points ({what} {low:+.2f} to {high:+.2f})"


def p_value(p: float) -> str:
    """Four digits of it."""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


class _Question(NamedTuple):
    """What a claim says of these rows against the baseline: "above", "below", or "within" the margin."""

    text: str
    baseline: str
    relation: str
    names: list[str]


def _questions(rows: Rows) -> list[_Question]:
    """The reference's four claims; the student alone may have a name of its own."""
    student = rows.student_of(("resnet18", "reference")) or "student"
    reference = {job: row for job, row in RECIPES.items() if row.reference}
    features = [job for job, row in reference.items() if row.network == "feature_student"]
    distilled = [job for job, row in reference.items() if row.distils]
    schedules = [
        job
        for job, row in reference.items()
        if (row.network, row.soft) == ("student", "kd") and isinstance(row.alpha, str)
    ]
    best = "distillation_LDH6"
    rivals = [student, *(job for job in distilled if job != best)]
    within = "Schedules of alpha, in KD, are within noise of a constant alpha"
    return [
        _Question("Feature rows are above the student", student, "above", features),
        _Question(f"{best} is the best of the students", best, "below", rivals),
        _Question(f"{within} ({MARGIN:g} points)", "distillation", "within", schedules),
        _Question("Every distilled row is above the student", student, "above", distilled),
    ]


def claim_pairs(rows: Rows) -> list[Pair]:
    """All pairs of rows that the claims compare; without those that were trained otherwise."""
    return [
        (name, question.baseline)
        for question in _questions(rows)
        for name in question.names
        if {name, question.baseline} <= rows.keys() and not unlike(rows, name, question.baseline)
    ]


def claims(rows: Rows, judged: Judged) -> list[Claim]:
    """What the runs say of each of the reference's four claims.

    "yes" takes rows that are all beyond noise in its favour (see statistics.Comparison), "no" one that is beyond noise
    against it. "Within noise" is yes where every row is surely within the margin, no where one is beyond noise and not
    within it. From one seed nothing counts for either: it tells of two networks, not of two methods.
    """
    found = []
    for question in _questions(rows):
        compared = _compared(rows, judged, question)
        verdict = _verdict(question, list(compared.values()))
        found.append(Claim(question.text, verdict, _evidence(rows, compared, question)))
    return found


def _verdict(question: _Question, compared: list[Comparison]) -> str:
    if question.relation == "within":
        against = any(found.beyond_noise and not found.within_margin for found in compared)
        favourable = [found.within_margin for found in compared]
    else:
        sign = 1 if question.relation == "above" else -1
        against = any(found.beyond_noise and sign * found.gain < 0 for found in compared)
        favourable = [bool(found.beyond_noise) and sign * found.gain > 0 for found in compared]
    return "no" if against else "yes" if favourable.count(True) == len(question.names) else "not settled"


def _compared(rows: Rows, judged: Judged, question: _Question) -> dict[str, Comparison]:
    pairs = {(name, question.baseline): name for name in question.names}
    return {pairs[pair]: judged[pair] for pair in claim_pairs(rows) if pair in pairs and pair in judged}


def unlike(rows: Rows, name: str, other: str) -> list[str]:
    """What two rows were trained with that is not the same, or, of epochs, not in proportion to the reference's."""
    ours, theirs = rows[name], rows[other]
    runs = [*ours.values(), *theirs.values()]
    alike = SETUP | {
        "learning rate": lambda run: run.recipe["learning_rate"],
        "batches": lambda run: run.recipe["batch_size"],
    }
    shares = [run.recipe["epochs"] / full_epochs(run) for run in runs]
    rounding = sum(0.5 / full_epochs(rows.first(row)) for row in (name, other))
    return otherwise(ours, theirs, alike) + ["epochs"] * (max(shares) - min(shares) > rounding + 1e-9)


def _evidence(rows: Rows, compared: dict[str, Comparison], question: _Question) -> list[str]:
    lines, baseline, names = [], question.baseline, question.names
    for name, found in compared.items():
        seeds = len(found.gains)
        words = [difference(found), f"{seeds} seed{'s' * (seeds > 1)}"]
        if found.beyond_noise is None:
            words.append("not judged")
        else:
            words += [f"p {p_value(found.adjusted)} after Holm", "not " * (not found.beyond_noise) + "beyond noise"]
        if question.relation == "within":
            words.append(f"{'' if found.within_margin else 'not '}surely within {MARGIN:g} points")
        lines.append(f"{marked(name)} against {baseline}: {', '.join(words)}")
    missing = [name for name in names if name not in compared]
    ways = {name: unlike(rows, name, baseline) for name in missing if name in rows and baseline in rows}
    if others := {name: way for name, way in ways.items() if way}:
        told = ", ".join(f"{name} ({', '.join(way)})" for name, way in others.items())
        lines.append(f"not trained as {baseline} was, so not compared with it: {told}")
        missing = [name for name in missing if name not in others]
    return lines + [f"no run to compare with {baseline}: {', '.join(missing)}"] * bool(missing)


def claims_section(rows: Rows, judged: Judged) -> str:
    """The claims as a section of RESULTS.md."""
    lines = [
        "## The reference's claims",
        f"Yes or no only where it is beyond noise at {100 * LEVEL:.0f} %, judged together with the table: one spread, "
        "and one correction over all differences of this page. Nothing is judged from one seed, which tells of two "
        f"networks, not of two methods. Within noise: the row surely differs by less than {MARGIN:g} points, both its "
        "90 % intervals, over seeds and over test images, lying within that margin, which is the same for all data.",
    ]
    for claim in claims(rows, judged):
        evidence = "\n".join(f"- {line}" for line in claim.evidence)
        lines.append(f"**{claim.text}: {claim.verdict}.**\n\n{evidence}")
    return "\n\n".join(lines)
