"""Estimates with their errors, and whether a difference is more than noise.

Formulas that are not scipy's own have their source at the function. All intervals and tests are
two-sided.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

LEVEL = 0.95  # of intervals; a difference is called one if chance makes it in fewer than 1 of 20
POWER = 0.8  # the chance with which the named number of values would show a difference
SAMPLES = 4000  # of the bootstrap
AT_ONCE = 1 << 22  # numbers drawn at a time
MOST = 10**12  # values; where more would be needed, no number is named


class Interval(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, from values drawn at random."""

    value: float
    error: float
    """The standard error; NaN: not known, as for one value."""
    degrees: float
    """Degrees of freedom of Student's t; infinite: the normal distribution."""
    count: int
    """The values, or pairs of values, that it comes from."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The limits between which the true value is with this probability; NaN: not known."""
        half = quantile((1 + level) / 2, self.degrees) * self.error
        return self.value - half, self.value + half

    def p_value(self, against: float = 0.0) -> float:
        """How often chance alone puts an estimate at least this far from `against`; NaN: not
        known. With an error of 0 it is 1 or 0."""
        apart = abs(self.value - against)
        if math.isnan(self.error):
            return math.nan
        if not self.error:
            return 0.0 if apart else 1.0
        return 2 * float(stats.t.sf(apart / self.error, self.degrees))

    def more(self, level: float = LEVEL, power: float = POWER, against: float = 0.0) -> int | None:
        """How many more such values would show, with this power, that the true value is not
        `against`, if it is what it seems to be; 0: these do. None: no number would, or none can be
        told."""
        if self.p_value(against) < 1 - level:
            return 0
        needed = self.needed(level, power, against)
        return None if needed is None else needed - self.count

    def needed(
        self, level: float = LEVEL, power: float = POWER, against: float = 0.0
    ) -> int | None:
        """How many such values in all, at least one more than there are, would show with this
        power that the true value is not `against`; None as in `more`."""
        apart = abs(self.value - against)
        if not apart or not self.error > 0:
            return None

        def shows(count: int) -> bool:
            degrees = self.degrees * count / self.count
            reach = quantile((1 + level) / 2, degrees) + quantile(power, degrees)
            return reach * self.error * math.sqrt(self.count / count) <= apart

        low, high = self.count, self.count + 1  # low does not show it, or is one too few
        while not shows(high):
            low, high = high, 2 * high
            if high > MOST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if shows(middle) else (middle, high)
        return high


def quantile(probability: float, degrees: float) -> float:
    """That of Student's t; NaN without degrees of freedom."""
    if degrees <= 0 or math.isnan(degrees):
        return math.nan
    return float(stats.t.ppf(probability, degrees))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of values. Raises ValueError if there are none."""
    array = _array(values)
    count = len(array)
    error = float(array.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(array.mean()), error, count - 1, count)


def paired(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of b - a, of values that belong together. Raises ValueError for other lengths."""
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} values are not pairs")
    return mean((second - first).tolist())


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of `b` minus that of `a`, of two samples that may differ in spread (Welch 1947).
    `count` is the size of the smaller one."""
    first, second = mean(a), mean(b)
    count = min(first.count, second.count)
    squares = [first.error**2, second.error**2]
    error = math.sqrt(sum(squares))  # NaN if either is
    shares = sum(s**2 / e.degrees for s, e in zip(squares, (first, second), strict=True)
                 if e.degrees)  # fmt: skip
    degrees = sum(squares) ** 2 / shares if shares > 0 else math.inf if error == 0 else math.nan
    return Estimate(second.value - first.value, error, degrees, count)


def ratio(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The sum of values over the sum of their weights, for pairs drawn at random (the ratio
    estimator; Cochran 1977, 6.4). Raises ValueError if the weights' sum is not positive."""
    v, w = _array(values), _array(weights)
    total, count = float(w.sum()), len(v)
    if not total > 0:
        raise ValueError(f"the weights' sum is {total:g}: it should be positive")
    found = float(v.sum()) / total
    rest = v - found * w
    error = math.nan
    if count > 1:  # (a product raises no error where ** would, for huge values)
        error = math.sqrt(float((rest * rest).sum()) * count / (count - 1)) / total
    return Estimate(found, error, count - 1, count)


def pooled(groups: Iterable[Sequence[float]]) -> tuple[float, float]:
    """The standard deviation within groups that have the same one, and its degrees of freedom; NaN
    and 0 if no group has two values."""
    squares, degrees = 0.0, 0
    for group in groups:
        array = _array(group)
        squares += float(((array - array.mean()) ** 2).sum())
        degrees += len(array) - 1
    return (math.sqrt(squares / degrees), degrees) if degrees else (math.nan, 0)


def against_best(
    means: Sequence[float], counts: Sequence[int], spread: float, degrees: float
) -> list[float]:
    """The p-value of each group's mean against the smallest one, which was chosen among all.

    The runner-up's is that of a plain two-sided t-test, which is right though the best was chosen:
    the choice is paid for by the second side (Gutmann and Maymin 1987; Hung and Fithian 2019). The
    others' are of the studentized range (Tukey-Kramer). Small values say: the group is worse. The
    best's own is 1.

    Args:
        means: of K groups.
        counts: each group's values.
        spread: the standard deviation within groups, all of which are taken to have the same.
        degrees: its degrees of freedom (`pooled` gives both).
    """
    if not degrees > 0 or math.isnan(spread):
        return [math.nan] * len(means)
    order = sorted(range(len(means)), key=lambda i: means[i])
    best = order[0]
    found = [1.0] * len(means)
    for place, i in enumerate(order[1:], 1):
        error = spread * math.sqrt(1 / counts[i] + 1 / counts[best])
        apart = means[i] - means[best]
        if not error or not apart:
            found[i] = 0.0 if apart else 1.0
        elif place == 1:
            found[i] = 2 * float(stats.t.sf(apart / error, degrees))
        else:
            q = math.sqrt(2) * apart / error
            found[i] = float(stats.studentized_range.sf(q, len(means), degrees))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family, adjusted so that chance makes the smallest one less than 0.05 in at
    most 1 of 20 families (Holm 1979). NaN stays, and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for place, (p, i) in enumerate(known):
        least = max(least, min(1.0, (len(known) - place) * p))
        adjusted[i] = least
    return adjusted


def wilcoxon(differences: Sequence[float]) -> float:
    """The p-value of Wilcoxon's signed-rank test: whether differences are as often and as far above
    zero as below it. A few large ones cannot decide it. 1 if all are 0."""
    array = _array(differences)
    return float(stats.wilcoxon(array).pvalue) if array.any() else 1.0


def wilson(right: int, count: int) -> Interval:
    """A share, with Wilson's 95% interval."""
    share = right / count
    low, high = stats.binomtest(right, count).proportion_ci(LEVEL, "wilson")
    return Interval(share, min(float(low), share), max(float(high), share))  # (rounding)


def mcnemar(better: int, worse: int) -> float:
    """The p-value of McNemar's exact test: how often chance splits texts on which two equally good
    models differ at least this unevenly."""
    count = better + worse
    return float(stats.binomtest(better, count).pvalue) if count else 1.0


def bootstrap(means: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """The 95% interval of the mean of (n,) values from `least` to `most`, by bootstrap.

    It is the percentile interval, widened for small samples as Student's t is (Hesterberg 2015,
    'expanded percentile'): without that it has too low a coverage. Values that are all the same
    have no spread, but other questions may have other values: 1 - 0.025^(1/n) of them, by Clopper
    and Pearson's limit.
    """
    n = len(means)
    if n < 2:
        return math.nan, math.nan
    if (means == means[0]).all():
        others = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        low, high = (means[0] + others * (end - means[0]) for end in (least, most))
        return float(low), float(high)
    rng = np.random.default_rng(0)
    rows = max(1, AT_ONCE // n)
    drawn = [
        means[rng.integers(0, n, (min(rows, SAMPLES - start), n))].mean(axis=1)
        for start in range(0, SAMPLES, rows)
    ]
    tail = special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 - LEVEL) / 2))
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def rounded(number: int) -> int:
    """The number, rounded up to two digits that count."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def _array(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("there are no values")
    return array
