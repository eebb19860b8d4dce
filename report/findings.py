"""Plain sentences that follow from figures alone: what the rows show, and what they say of the reference's claims."""

from typing import NamedTuple

from recipes import RECIPES
from report.results import SETUP, Rows, otherwise
from report.statistics import LEVEL, Comparison, fewest_images, gains_on_student, noise, students_against

FEW_IMAGES = 1000  # with fewer test images, a difference that a paper would report is a handful of them


class Claim(NamedTuple):
    """A claim of the reference. verdict: "yes", "no" or "not settled"; evidence: each difference, a line each."""

    text: str
    verdict: str
    evidence: list[str]


def findings(rows: Rows) -> list[str]:
    """The best student row, its gain and what is beyond noise; where there are few test images, what they can show.

    Students of several networks or trainings are told of apart.
    """
    if not rows.students:
        return ["Only the teacher ran: there is nothing to compare it with."]
    gains, kinds = gains_on_student(rows), rows.kinds
    if len(kinds) == 1:
        (facts,) = (_best_facts(rows, kind, gains, "that ran") for kind in kinds)
    else:
        facts = [" ".join(_best_facts(rows, kind, gains, f"of {', '.join(kind)}")) for kind in kinds]
    return facts + _beyond_facts(gains) + _few_images_facts(rows, gains)


def _best_facts(rows: Rows, kind: tuple[str, str], gains: dict[str, Comparison], which: str) -> list[str]:
    """The best of the students of one network and training, and its gain. which: the words for them."""
    students, alone = rows.kinds[kind], rows.student_of(kind)
    best = max(students, key=rows.top1)
    facts = [f"Best of the students {which} ({len(students)}) by mean top-1: {best}, {rows.top1(best):.2f} %."]
    if alone is None:
        facts.append("The student on hard labels alone did not run, so there is no gain to tell.")
    elif students == [alone]:
        facts.append("No distilled row ran, so there is no gain to tell.")
    elif best == alone:
        facts.append("No distilled row is above the student on hard labels alone.")
    elif best not in gains:
        facts.append("It has no seed in common with the student, so there is no gain to tell.")
    else:
        facts += _gain_facts(gains[best], rows)
        if len(students) > 2:
            facts.append("It is the best of several on the same test images, which flatters its gain a little.")
    return facts


def _gain_facts(found: Comparison, rows: Rows) -> list[str]:
    facts = [f"Its gain on the student in top-1 is {difference(found)}{_judgement(found, rows)}."]
    if not found.over_seeds:
        facts.append("That is one seed: how far another seed would move it is not known from these runs.")
    elif len(found.gains) == 1:
        facts.append("That is one seed: how far another would move it is taken from the seeds of other rows.")
    else:
        facts.append(f"Seed by seed it is {', '.join(f'{value:+.2f}' for value in found.gains.values())}.")
    return facts


def _judgement(found: Comparison, rows: Rows) -> str:
    if found.beyond_noise is not None:
        return f", {'beyond' if found.beyond_noise else 'not beyond'} noise (p {p_value(found.adjusted)} after Holm)"
    relation = "more" if found.gain > noise(rows) else "not more"
    return f", {relation} than the {noise(rows):.2f} points by which two runs differ by chance"


def _beyond_facts(gains: dict[str, Comparison]) -> list[str]:
    told = [name for name, found in gains.items() if found.beyond_noise is not None]
    above = [name for name in told if gains[name].beyond_noise and gains[name].gain > 0]
    below = [name for name in told if gains[name].beyond_noise and gains[name].gain < 0]
    others = [name for name in told if name not in above + below]
    parts = {"Above the student beyond noise": above, "Below the student beyond noise": below}
    facts = [f"{words}: {', '.join(names) or 'none'}." for words, names in parts.items()] if told else []
    return facts + [f"Not told from the student by these test images and seeds: {', '.join(others)}."] * bool(others)


def _few_images_facts(rows: Rows, gains: dict[str, Comparison]) -> list[str]:
    """What so few test images can show at best; nothing where there are many."""
    n = rows.any_run.data["test_images"]
    if n >= FEW_IMAGES:
        return []
    count = max(1, len(gains))
    alone, first = fewest_images(1), fewest_images(count)
    text = (
        f"{n:,} test images are few: one image is {100 / n:.2f} points. Two rows can't be told apart by less than "
        f"{alone} images, {100 * alone / n:.2f} points, even where all images on which they differ are for one of them"
    )
    if first > alone:
        text += f"; as one of {count} rows compared, by less than {first}, {100 * first / n:.2f} points"
    return [f"{text}. Most differences that a method makes are smaller: such figures check the pipeline."]


def difference(found: Comparison) -> str:
    """The difference in points with its interval, in words."""
    if found.interval is None:
        return f"{found.gain:+.2f} points"
    low, high = found.interval
    return f"{found.gain:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def p_value(p: float) -> str:
    """Four digits of it."""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def claims(rows: Rows) -> list[Claim]:
    """What the runs say of each of the reference's four claims.

    "yes" takes rows that are all beyond noise in its favour (see statistics.Comparison), "no" one that is beyond noise
    against it. "Within noise" is yes where every interval lies within the points by which two runs differ by chance.
    Where no two rows share two seeds, nothing counts for either: one seed tells of two networks, not of two methods.
    """
    reference = {job: row for job, row in RECIPES.items() if row.reference}
    features = [job for job, row in reference.items() if row.network == "feature_student"]
    distilled = [job for job, row in reference.items() if row.distils]
    schedules = [
        job
        for job, row in reference.items()
        if (row.network, row.soft) == ("student", "kd") and isinstance(row.alpha, str)
    ]
    best = "distillation_LDH6"
    rivals = [job for job, row in reference.items() if row.network != "teacher" and job != best]
    return [
        _above(rows, "Feature rows are above the student", "student", features),
        _best(rows, f"{best} is the best of the students", best, rivals),
        _within(rows, "Schedules of alpha, in KD, are within noise of a constant alpha", "distillation", schedules),
        _above(rows, "Every distilled row is above the student", "student", distilled),
    ]


def _above(rows: Rows, text: str, baseline: str, names: list[str]) -> Claim:
    found = _compared(rows, baseline, names)
    signs = [_sign(comparison) for comparison in found.values()]
    verdict = "no" if -1 in signs else "yes" if signs.count(1) == len(names) else "not settled"
    return Claim(text, verdict, _evidence(rows, found, baseline, names))


def _best(rows: Rows, text: str, best: str, rivals: list[str]) -> Claim:
    found = _compared(rows, best, rivals)
    signs = [_sign(comparison) for comparison in found.values()]
    verdict = "no" if 1 in signs else "yes" if signs.count(-1) == len(rivals) else "not settled"
    return Claim(text, verdict, _evidence(rows, found, best, rivals))


def _within(rows: Rows, text: str, baseline: str, names: list[str]) -> Claim:
    found = _compared(rows, baseline, names)
    limit = noise(rows)
    inside = [c.over_seeds and max(map(abs, c.interval)) <= limit for c in found.values()]
    different = any(_sign(comparison) for comparison in found.values())
    verdict = "no" if different else "yes" if inside.count(True) == len(names) else "not settled"
    evidence = _evidence(rows, found, baseline, names)
    return Claim(text, verdict, [f"two runs differ by chance by up to about {limit:.2f} points", *evidence])


def _compared(rows: Rows, baseline: str, names: list[str]) -> dict[str, Comparison]:
    """The rows that ran against the baseline; against the student corrected as in the table, over all that it has."""
    if baseline not in rows:
        return {}
    names = [name for name in names if name in rows and not _unlike(rows, name, baseline)]
    found = gains_on_student(rows) if baseline == "student" else students_against(rows, baseline, names)
    return {name: found[name] for name in names if name in found}


def _unlike(rows: Rows, name: str, other: str) -> list[str]:
    """What two rows of the reference were trained with that is not the same, or, of epochs, not in proportion."""
    ours, theirs = rows[name], rows[other]
    runs = [*ours.values(), *theirs.values()]
    alike = SETUP | {
        "learning rate": lambda run: run.recipe["learning_rate"],
        "batches": lambda run: run.recipe["batch_size"],
    }
    shares = [run.recipe["epochs"] / RECIPES[run.job].epochs for run in runs]
    rounding = sum(0.5 / RECIPES[row].epochs for row in (name, other))
    return otherwise(ours, theirs, alike) + ["epochs"] * (max(shares) - min(shares) > rounding + 1e-9)


def _sign(found: Comparison) -> int:
    """1 above, -1 below, both beyond noise and held against other seeds; else 0."""
    return 0 if not (found.beyond_noise and found.over_seeds) else 1 if found.gain > 0 else -1


def _evidence(rows: Rows, found: dict[str, Comparison], baseline: str, names: list[str]) -> list[str]:
    lines = []
    for name, comparison in found.items():
        seeds = len(comparison.gains)
        words = [difference(comparison), f"{seeds} seed{'s' * (seeds > 1)}"]
        if comparison.adjusted is not None:
            words.append(f"p {p_value(comparison.adjusted)} after Holm")
        words.append("beyond noise" if comparison.beyond_noise else "not beyond noise")
        lines.append(f"{name} against {baseline}: {', '.join(words)}")
    missing = [name for name in names if name not in found]
    ways = {name: _unlike(rows, name, baseline) for name in missing if name in rows and baseline in rows}
    if unlike := {name: way for name, way in ways.items() if way}:
        told = ", ".join(f"{name} ({', '.join(way)})" for name, way in unlike.items())
        lines.append(f"not trained as {baseline} was, so not compared with it: {told}")
        missing = [name for name in missing if name not in unlike]
    return lines + [f"no run to compare with {baseline}: {', '.join(missing)}"] * bool(missing)


def claims_section(rows: Rows) -> str:
    """The claims as a section of RESULTS.md."""
    lines = [
        "## The reference's claims",
        f"Yes or no only where it is beyond noise at {100 * LEVEL:.0f} %, with Holm's correction over the rows "
        "compared with the same one, and held against the spread of seeds: one seed alone tells of two networks, not "
        "of two methods.",
    ]
    for claim in claims(rows):
        evidence = "\n".join(f"- {line}" for line in claim.evidence)
        lines.append(f"**{claim.text}: {claim.verdict}.**\n\n{evidence}")
    return "\n\n".join(lines)
