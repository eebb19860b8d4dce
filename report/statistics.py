"""What two rows tested on the same images can be said to differ by: tests and intervals, all of them at 5 % or 95 %."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy

from report.results import Result, Rows

LEVEL = 0.05
Z = 1.959964  # of the normal distribution, two-sided

Interval = tuple[float, float]


@dataclass(frozen=True)
class Spread:
    """How far chance moves the top-1 of one run: a standard deviation, in points, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Comparison:
    """A row against another, seed by seed, in points of top-1.

    gains: for each seed that both have. mcnemar: the exact p for each seed whose two runs tell which of the same images
    they got right. interval: 95 % of the mean gain, see `compare`; None where it is not known. spread: of one run over
    seeds; None where the interval is over test images. p: that the two are the same, see `compare`; None where the
    images don't tell. adjusted: p after Holm's correction over the rows compared.
    """

    gains: dict[int, float]
    mcnemar: dict[int, float]
    interval: Interval | None
    spread: Spread | None
    p: float | None
    adjusted: float | None = None

    @property
    def gain(self) -> float:
        """The mean over seeds, in points."""
        return statistics.mean(self.gains.values())

    @property
    def over_seeds(self) -> bool:
        """Whether the interval says how far other seeds would move the gain."""
        return self.spread is not None

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the rows differ by more than chance; None where that can't be told."""
        return None if self.adjusted is None else self.adjusted < LEVEL


def against(rows: Rows, baseline: str, names: Iterable[str]) -> dict[str, Comparison]:
    """Each of the rows against the baseline row, with Holm's correction over them all; without what shares no seed."""
    names = [*names]
    spread = in_blocks([rows[name] for name in (baseline, *names)])
    return _against(rows, baseline, names, spread)


def students_against(rows: Rows, baseline: str, names: Iterable[str]) -> dict[str, Comparison]:
    """The same, how far seeds lie from each other being taken from all students' rows."""
    return _against(rows, baseline, names, in_blocks([rows[name] for name in rows.students]))


def _against(rows: Rows, baseline: str, names: Iterable[str], spread: Spread | None) -> dict[str, Comparison]:
    there = [name for name in names if rows[name].keys() & rows[baseline].keys()]
    found = {name: compare(rows[name], rows[baseline], spread) for name in there}
    known = {name: comparison.p for name, comparison in found.items() if comparison.p is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    return {name: replace(comparison, adjusted=adjusted.get(name)) for name, comparison in found.items()}


def gains_on_student(rows: Rows) -> dict[str, Comparison]:
    """Every student's row against that of the same network and training on hard labels alone, where that ran."""
    found = {}
    for kind, names in rows.kinds.items():
        if alone := rows.student_of(kind):
            of_kind = Rows({name: rows[name] for name in names})
            found |= students_against(of_kind, alone, [name for name in names if name != alone])
    return found


def compare(ours: dict[int, Result], theirs: dict[int, Result], spread: Spread | None) -> Comparison:
    """A row's runs against another's, both by seed, over the seeds that both have: at least one.

    spread: of one run, see `in_blocks`. interval: Student's of the gains' mean, which says how far other seeds would
    move it; without a spread, of one seed, Newcombe's, which says how far other test images would.
    p: of the sign test over images (see `sign_test`), or that of the t test over seeds if it is larger, as a difference
    has to hold for other test images and for other seeds.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    gains = {seed: ours[seed].test["top1"] - theirs[seed].test["top1"] for seed in seeds}
    pairs = {seed: (ours[seed].right, theirs[seed].right) for seed in seeds if same_images(ours[seed], theirs[seed])}
    by_seed = {seed: mcnemar(*discordant(*pair)) for seed, pair in pairs.items()}
    mean, p, interval = statistics.mean(gains.values()), None, None
    if len(pairs) == len(seeds):
        p = sign_test(list(pairs.values()))
    if spread:
        error = spread.deviation * math.sqrt(2 / len(seeds))  # of the mean of so many differences of two runs
        interval = t_interval(mean, error, spread.freedom)
        p = None if p is None else max(p, t_test(mean, error, spread.freedom))
    elif pairs:
        interval = newcombe(*next(iter(pairs.values())))
    return Comparison(gains, by_seed, interval, spread, p)


def in_blocks(rows: list[dict[int, Result]]) -> Spread | None:
    """Of one run about what its row and its seed are worth, over all the rows: what is left of top-1 = row + seed.

    Randomised blocks, the seeds being the blocks (Fisher, The Design of Experiments (1935)), by least squares. Of two
    rows it gives the paired t test; of more it has more degrees of freedom, which two or three seeds need, and takes
    chance to be as large in each row. None where there is no degree of freedom.
    """
    cells = [(row, seed, run.test["top1"]) for row, runs in enumerate(rows) for seed, run in runs.items()]
    seeds = sorted({seed for _, seed, _ in cells})
    design = numpy.zeros((len(cells), len(rows) + len(seeds)))
    for line, (row, seed, _) in zip(design, cells, strict=True):
        line[row] = line[len(rows) + seeds.index(seed)] = 1
    top1 = numpy.array([value for *_, value in cells])
    worth, _, rank, _ = numpy.linalg.lstsq(design, top1, rcond=None)
    return _spread(float(((top1 - design @ worth) ** 2).sum()), len(cells) - int(rank))


def within_rows(rows: Iterable[dict[int, Result]]) -> Spread | None:
    """Of one run about its row's mean, over all the rows; None where none has two runs."""
    values = [[run.test["top1"] for run in runs.values()] for runs in rows]
    several = [row for row in values if len(row) > 1]
    squares = sum((len(row) - 1) * statistics.variance(row) for row in several)
    return _spread(squares, sum(len(row) - 1 for row in several))


def _spread(squares: float, freedom: int) -> Spread | None:
    if freedom == 0:
        return None
    deviation = math.sqrt(squares / freedom)
    return Spread(deviation if deviation > 1e-9 else 0.0, freedom)  # not 0 by rounding alone


def same_images(ours: Result, theirs: Result) -> bool:
    """Whether both were tested on the very same images and tell which of them they got right."""
    fingerprints = [run.data.get("test_fingerprint") for run in (ours, theirs)]
    told = ours.right is not None and theirs.right is not None
    return told and fingerprints[0] is not None and fingerprints[0] == fingerprints[1]


def discordant(ours: numpy.ndarray, theirs: numpy.ndarray) -> tuple[int, int]:
    """How many images only ours got right, and how many only theirs."""
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


def mcnemar(b: int, c: int) -> float:
    """The exact two-sided p of McNemar's test: that of b heads and c tails of a fair coin.

    McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12 (1947).
    """
    from scipy.stats import binomtest

    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def sign_test(pairs: list[tuple[numpy.ndarray, numpy.ndarray]]) -> float:
    """McNemar's exact test over all seeds at once; for one seed it is that test.

    An image counts for the row that gets it right in more of the seeds. So it counts once, and that the seeds share
    their test images does no harm.
    """
    balance = sum(ours.astype(int) - theirs for ours, theirs in pairs)
    return mcnemar(int((balance > 0).sum()), int((balance < 0).sum()))


def newcombe(ours: numpy.ndarray, theirs: numpy.ndarray) -> Interval:
    """The 95 % interval, in points, of the difference of two top-1s on the same images.

    Method 10, Wilson's limits squared and added, of Newcombe, Improved confidence intervals for the difference between
    binomial proportions based on paired data, Statistics in Medicine 17 (1998), 2635-2650.
    """
    n, (b, c) = len(ours), discordant(ours, theirs)
    a = int((ours & theirs).sum())
    d = n - a - b - c
    p, q = (a + b) / n, (a + c) / n
    (p_low, p_high), (q_low, q_high) = wilson(a + b, n), wilson(a + c, n)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    covariance = a * d - b * c
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    phi = covariance / math.sqrt(product) if product else 0
    below = _third_side(p - p_low, q_high - q, phi)
    above = _third_side(p_high - p, q - q_low, phi)
    return 100 * (p - q - below), 100 * (p - q + above)


def _third_side(first: float, second: float, cosine: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * cosine * first * second + second**2))


def wilson(right: int, n: int) -> Interval:
    """Wilson's 95 % interval of a proportion, from 0 to 1 (J. Am. Stat. Assoc. 22 (1927), 209-212)."""
    p = right / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def t_interval(mean: float, error: float, freedom: int) -> Interval:
    """Student's 95 % interval around a mean, from its standard error and that error's degrees of freedom."""
    from scipy.stats import t

    half = float(t.ppf(1 - LEVEL / 2, freedom)) * error
    return mean - half, mean + half


def t_test(mean: float, error: float, freedom: int) -> float:
    """The two-sided p of Student's test that what has this mean and this standard error is 0."""
    from scipy.stats import t

    if error == 0:
        return float(abs(mean) < 1e-9)
    return float(2 * t.sf(abs(mean) / error, freedom))


def holm(ps: list[float]) -> list[float]:
    """The p values adjusted for their number: Holm, Scandinavian Journal of Statistics 6 (1979), 65-70."""
    adjusted, largest = list(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, (len(ps) - rank) * ps[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def own_intervals(rows: Rows) -> dict[str, Interval]:
    """The 95 % interval, in percent, of each row's top-1: over its seeds; of a single run Wilson's, over test images.

    How far seeds lie from each other is taken from all students' rows together, see `within_rows`: as if a seed moved
    each row on its own, and as far in each.
    """
    students, found = within_rows(rows[name] for name in rows.students), {}
    for name, runs in rows.items():
        seeds, top1 = len(runs), rows.top1(name)
        if seeds > 1:
            spread = within_rows([runs]) if rows.is_teacher(name) else students
            found[name] = t_interval(top1, spread.deviation / math.sqrt(seeds), spread.freedom)
        else:
            n = rows.first(name).data["test_images"]
            found[name] = tuple(100 * limit for limit in wilson(round(top1 / 100 * n), n))
    return found


def standard_error(rows: Rows) -> float:
    """The binomial standard error, in points, of one run's top-1: sqrt(p (1 - p) / n) for the median row."""
    n = rows.any_run.data["test_images"]
    return binomial_error(statistics.median(rows.top1(name) for name in rows), n)


def binomial_error(top1: float, images: int) -> float:
    """The binomial standard error of a top-1 in percent, in points: sqrt(p (1 - p) / n)."""
    # No network is so good, or so bad, that n images tell its top-1 exactly.
    p = min(max(top1 / 100, 1 / images), 1 - 1 / images)
    return 100 * math.sqrt(p * (1 - p) / images)


def noise(rows: Rows) -> float:
    """About so many points two runs differ by chance: two standard errors of a difference of two top-1s."""
    return 2 * math.sqrt(2) * standard_error(rows)


def fewest_images(comparisons: int) -> int:
    """How many test images a row must win, and lose none, to be beyond noise as the clearest of so many rows."""
    k = 1
    while mcnemar(k, 0) * comparisons >= LEVEL:
        k += 1
    return k
