"""Compare rows tested on the same images: tests and intervals, all of them at 5 % or 95 %."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy

from report.results import Result, Rows

LEVEL = 0.05
Z = 1.959964  # of the normal distribution, two-sided

# Two rows are within noise of each other if they surely differ by less than this, in points of top-1: about the spread
# of one run over seeds in this project's studies, 0.4 to 0.5 points. It is the same for every data set, so few test
# images make nothing easier.
MARGIN = 0.5
UNEVEN = 0.1  # p of Cochran's test below which a table warns; at LEVEL a row's own spread is used as well, see `judge`
POWER = 0.8

Interval = tuple[float, float]
Pair = tuple[str, str]  # a row, and the row that it is compared with


@dataclass(frozen=True)
class Spread:
    """The standard deviation of one run's top-1 over seeds, in points, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Comparison:
    """A row against another, in points of top-1.

    gains: seed -> the gain, for each seed that both have. gain: of the row, by least squares, see `Blocks`; it is the
    mean of `gains` if all rows compared have the same seeds. mcnemar: seed -> the exact p on the test images, for each
    seed whose two results tell which images were right.
    spread: of one run; None if no two rows compared share two seeds. Then error, p and adjusted are None, too.
    error: the standard error of the gain over seeds. image_error: over test images; None if the images aren't known.
    interval: 95 % of the gain, over seeds; over test images if there is one seed and no spread; else None.
    p: of the t test over seeds or, if larger, of the sign test over images, as a difference has to hold for other seeds
    and for other images; None if the images aren't known. adjusted: p after Holm's correction, see `judge`.
    """

    gains: dict[int, float]
    gain: float
    mcnemar: dict[int, float]
    spread: Spread | None = None
    error: float | None = None
    image_error: float | None = None
    interval: Interval | None = None
    p: float | None = None
    adjusted: float | None = None

    @property
    def over_seeds(self) -> bool:
        """Whether the interval says how far other seeds would move the gain."""
        return self.spread is not None

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the rows differ by more than chance; None if that can't be judged, as from one seed."""
        return None if self.adjusted is None else self.adjusted < LEVEL

    @property
    def within_margin(self) -> bool:
        """Whether the rows surely differ by less than MARGIN: two one-sided tests at 5 %, over seeds and over images.

        That is, both 90 % intervals lie within the margin (Schuirmann, Journal of Pharmacokinetics and
        Biopharmaceutics 15 (1987), 657-680).
        """
        if self.spread is None or self.image_error is None:
            return False
        over_seeds, over_images = _t_quantile(1 - LEVEL, self.spread.freedom) * self.error, 1.644854 * self.image_error
        return abs(self.gain) + max(over_seeds, over_images) < MARGIN


def judge(rows: Rows, pairs: Iterable[Pair]) -> dict[Pair, Comparison]:
    """All differences that one table shows, judged together; without pairs that share no seed.

    So a pair has one answer wherever it stands. The spread is pooled over all rows that are compared with each other,
    directly or through others. A row whose runs lie further apart than the others' (see `uneven`) is judged by its own
    pair of rows, the paired t test, where that is less sure. Holm's correction is over all differences; a pair and its
    reverse are one.
    """
    pairs = [pair for pair in dict.fromkeys(pairs) if rows[pair[0]].keys() & rows[pair[1]].keys()]
    groups = linked(rows, pairs)
    blocks = {name: fit for fit in map(Blocks, groups) for name in fit.rows}
    apart = {uneven_row[0] for uneven_row in map(uneven, groups) if uneven_row and uneven_row[1] < LEVEL}
    found = {}
    for pair in pairs:
        fit = blocks[pair[0]]
        if apart & {*pair}:
            alone = Blocks(Rows({name: rows[name] for name in pair}))
            fit = max(fit, alone, key=lambda each: each.half_interval(*pair))
        found[pair] = _compare(fit, *pair)
    ps = {frozenset(pair): comparison.p for pair, comparison in found.items() if comparison.p is not None}
    adjusted = dict(zip(ps, holm([*ps.values()]), strict=True))
    return {pair: replace(comparison, adjusted=adjusted.get(frozenset(pair))) for pair, comparison in found.items()}


def student_pairs(rows: Rows) -> list[Pair]:
    """Every student's row with that of the same network and training on hard labels alone, where that ran."""
    pairs = [(name, rows.student_of(kind, name)) for kind, names in rows.kinds.items() for name in names]
    return [(name, alone) for name, alone in pairs if alone not in (None, name)]


def gains_on_student(rows: Rows, judged: dict[Pair, Comparison]) -> dict[str, Comparison]:
    """Row -> its comparison with the student, of those judged."""
    return {pair[0]: judged[pair] for pair in student_pairs(rows) if pair in judged}


def linked(rows: Rows, pairs: Iterable[Pair]) -> list[Rows]:
    """The rows that are compared with each other, directly or through others: each such group apart."""
    groups: list[set[str]] = []
    for pair in pairs:
        joined = {*pair}.union(*(group for group in groups if group & {*pair}))
        groups = [group for group in groups if not group & joined] + [joined]
    return [Rows({name: rows[name] for name in rows if name in group}) for group in groups]


class Blocks:
    """top-1 = row + seed, by least squares over all runs of the rows: randomised blocks, the seeds being the blocks.

    Fisher, The Design of Experiments (1935). Of two rows it gives the paired t test. More rows give more degrees of
    freedom, which two or three seeds need; the spread is taken to be alike in all of them. Where a row lacks seeds,
    what these are worth is taken from the other rows, so the t test is exact there, too.
    spread: of one run, from what row and seed leave; None if there is no degree of freedom.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._index = {name: i for i, name in enumerate(rows)}
        seeds = {seed: i for i, seed in enumerate(sorted({seed for runs in rows.values() for seed in runs}), len(rows))}
        cells = [(self._index[name], seeds[seed]) for name, runs in rows.items() for seed in runs]
        design = numpy.zeros((len(cells), len(rows) + len(seeds)))
        for line, cell in zip(design, cells, strict=True):
            line[[*cell]] = 1
        top1 = numpy.array([run.test["top1"] for run in rows.runs()])
        self._covariance = numpy.linalg.pinv(design.T @ design, hermitian=True)
        self._worth = self._covariance @ design.T @ top1
        # A design of rows and seeds that are linked has one column too many.
        freedom = len(cells) - (design.shape[1] - 1)
        self.spread = _spread(float(((top1 - design @ self._worth) ** 2).sum()), freedom)
        if self.spread and not self.spread.deviation:  # by chance alone: what rounding to whole images has
            self.spread = Spread(100 / rows.any_run.data["test_images"] / math.sqrt(12), freedom)

    def difference(self, ours: str, theirs: str) -> tuple[float, float]:
        """One row less the other, in points; and its standard error where a run's spread is 1 point."""
        contrast = numpy.zeros(len(self._worth))
        contrast[self._index[ours]], contrast[self._index[theirs]] = 1, -1
        return float(contrast @ self._worth), math.sqrt(contrast @ self._covariance @ contrast)

    def half_interval(self, ours: str, theirs: str) -> float:
        """Half of the 95 % interval of their difference; infinite where there is no spread."""
        if self.spread is None:
            return math.inf
        return (
            _t_quantile(1 - LEVEL / 2, self.spread.freedom) * self.spread.deviation * self.difference(ours, theirs)[1]
        )


def _compare(blocks: Blocks, name: str, other: str) -> Comparison:
    ours, theirs = blocks.rows[name], blocks.rows[other]
    seeds = sorted(ours.keys() & theirs.keys())
    gains = {seed: ours[seed].test["top1"] - theirs[seed].test["top1"] for seed in seeds}
    pairs = {seed: (ours[seed].right, theirs[seed].right) for seed in seeds if same_images(ours[seed], theirs[seed])}
    gain, unit_error = blocks.difference(name, other)
    gain = round(gain, 9) + 0.0  # without what rounding leaves, and no -0
    found = Comparison(gains, gain, {seed: mcnemar(*discordant(*pair)) for seed, pair in pairs.items()})
    if not blocks.spread:
        interval = newcombe(*pairs[seeds[0]]) if len(pairs) == len(seeds) == 1 else None
        return replace(found, interval=interval)
    error, freedom = blocks.spread.deviation * unit_error, blocks.spread.freedom
    found = replace(found, spread=blocks.spread, error=error, interval=t_interval(gain, error, freedom))
    if len(pairs) < len(seeds):
        return found
    p = max(sign_test([*pairs.values()]), t_test(gain, error, freedom))
    return replace(found, p=p, image_error=_image_error([*pairs.values()]))


def _balance(pairs: list[tuple[numpy.ndarray, numpy.ndarray]]) -> numpy.ndarray:
    """Of each image: in how many seeds only ours got it right, less in how many only theirs."""
    return sum(ours.astype(numpy.int8) - theirs.astype(numpy.int8) for ours, theirs in pairs)


def _image_error(pairs: list[tuple[numpy.ndarray, numpy.ndarray]]) -> float:
    balance = _balance(pairs)
    return 100 * float(balance.std()) / len(pairs) / math.sqrt(len(balance))


def uneven(rows: Rows) -> tuple[str, float] | None:
    """The row whose runs lie furthest apart, and p that all rows' runs lie equally far apart; None if that is untold.

    Cochran's C, the row's share of all rows' squares (Annals of Eugenics 11 (1941), 47-52), for rows of unequal numbers
    of seeds: such a share has a beta distribution, and p is Bonferroni's over the rows.
    """
    from scipy.special import betainc

    squares, freedom = {}, {}
    for name, runs in rows.items():
        if len(runs) > 1:
            freedom[name] = len(runs) - 1
            squares[name] = freedom[name] * statistics.variance(run.test["top1"] for run in runs.values())
    total = sum(squares.values())
    if len(squares) < 2 or total < 1e-12:
        return None
    free = sum(freedom.values())
    ps = {name: 1 - betainc(n / 2, (free - n) / 2, squares[name] / total) for name, n in freedom.items()}
    name = min(ps, key=ps.get)
    return name, min(1.0, len(ps) * float(ps[name]))


def chance_to_find(gain: float, error: float, freedom: int, comparisons: int) -> float:
    """The probability that a true gain is found by the t test, as the clearest of so many comparisons."""
    from scipy.special import chdtri, ndtr

    limit, distance = _t_quantile(1 - LEVEL / 2 / comparisons, freedom), gain / error
    # The mean over the spreads that may be seen: SciPy's noncentral t distribution is NaN for many such values.
    limits = limit * numpy.sqrt(chdtri(freedom, (numpy.arange(5000) + 0.5) / 5000) / freedom)
    return float((ndtr(distance - limits) + ndtr(-distance - limits)).mean())


def smallest_to_find(error: float, freedom: int, comparisons: int) -> float:
    """The smallest true gain that is found so in 80 % of cases."""
    low, high = 0.0, error
    while chance_to_find(high, error, freedom, comparisons) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chance_to_find(middle, error, freedom, comparisons) < POWER else (low, middle)
    return high


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
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5))) if b + c else 1.0


def sign_test(pairs: list[tuple[numpy.ndarray, numpy.ndarray]]) -> float:
    """McNemar's exact test over all seeds at once; for one seed it is that test.

    An image counts for the row that gets it right in more of the seeds. So it counts once, and that the seeds share
    their test images does no harm.
    """
    balance = _balance(pairs)
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
    half = _t_quantile(1 - LEVEL / 2, freedom) * error
    return mean - half, mean + half


def _t_quantile(probability: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def t_test(mean: float, error: float, freedom: int) -> float:
    """The two-sided p of Student's test that what has this mean and this standard error is 0."""
    from scipy.special import stdtr

    if error == 0:
        return float(abs(mean) < 1e-9)
    return float(2 * stdtr(freedom, -abs(mean) / error))


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
