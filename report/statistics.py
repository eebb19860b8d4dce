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
class Comparison:
    """A row against another, seed by seed, in points of top-1.

    gains: for each seed that both have. mcnemar: the exact p for each seed whose two runs tell which of the same images
    they got right. interval: 95 % of the mean gain, see `compare`; None where it is not known. p: that the two are the
    same, see `compare`; None where the images don't tell. adjusted: p after Holm's correction over the rows compared.
    """

    gains: dict[int, float]
    mcnemar: dict[int, float]
    interval: Interval | None
    p: float | None
    adjusted: float | None = None

    @property
    def gain(self) -> float:
        """The mean over seeds, in points."""
        return statistics.mean(self.gains.values())

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the rows differ by more than chance; None where that can't be told."""
        return None if self.adjusted is None else self.adjusted < LEVEL


def against(rows: Rows, baseline: str, names: Iterable[str]) -> dict[str, Comparison]:
    """Each of the rows against the baseline row, with Holm's correction over them all; without what shares no seed."""
    found = {name: compare(rows[name], rows[baseline]) for name in names if rows[name].keys() & rows[baseline].keys()}
    known = {name: comparison.p for name, comparison in found.items() if comparison.p is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    return {name: replace(comparison, adjusted=adjusted.get(name)) for name, comparison in found.items()}


def gains_on_student(rows: Rows) -> dict[str, Comparison]:
    """Every row but the teacher's against the student on hard labels alone; empty where that did not run."""
    if "student" not in rows:
        return {}
    return against(rows, "student", [name for name in rows if name != "student" and not rows.is_teacher(name)])


def compare(ours: dict[int, Result], theirs: dict[int, Result]) -> Comparison:
    """A row's runs against another's, both by seed, over the seeds that both have: at least one.

    interval: over two seeds or more the t interval of the gains' mean, which says how far other seeds would move it;
    of one seed Newcombe's interval, which says how far other test images would.
    p: of the sign test over images (see `sign_test`); over two seeds or more that of the paired t test if it is larger,
    as a difference has to hold for other test images and for other seeds.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    gains = {seed: ours[seed].test["top1"] - theirs[seed].test["top1"] for seed in seeds}
    pairs = {seed: (ours[seed].right, theirs[seed].right) for seed in seeds if same_images(ours[seed], theirs[seed])}
    by_seed = {seed: mcnemar(*discordant(*pair)) for seed, pair in pairs.items()}
    values, p, interval = list(gains.values()), None, None
    if len(pairs) == len(seeds):
        p = sign_test(list(pairs.values()))
    if len(seeds) > 1:
        interval = t_interval(values)
        p = None if p is None else max(p, t_test(values))
    elif pairs:
        interval = newcombe(*next(iter(pairs.values())))
    return Comparison(gains, by_seed, interval, p)


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


def t_interval(values: list[float]) -> Interval:
    """Student's 95 % interval of the mean of two values or more."""
    from scipy.stats import t

    half = t.ppf(1 - LEVEL / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def t_test(values: list[float]) -> float:
    """The two-sided p of Student's test that the mean of two values or more is 0."""
    from scipy.stats import t

    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0:
        return float(mean == 0)
    return float(2 * t.sf(abs(mean) / error, len(values) - 1))


def holm(ps: list[float]) -> list[float]:
    """The p values adjusted for their number: Holm, Scandinavian Journal of Statistics 6 (1979), 65-70."""
    adjusted, largest = list(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, (len(ps) - rank) * ps[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def own_interval(runs: Iterable[Result]) -> Interval:
    """The 95 % interval, in percent, of a row's top-1: over its seeds; of a single run Wilson's, over test images."""
    values, last = zip(*((run.test["top1"], run) for run in runs), strict=True)
    if len(values) > 1:
        return t_interval(list(values))
    n = last[0].data["test_images"]
    low, high = wilson(round(values[0] / 100 * n), n)
    return 100 * low, 100 * high


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
