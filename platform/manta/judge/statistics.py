"""Means of judgements, with two kinds of uncertainty that are not mixed up.

Over questions: how much the mean would differ with other questions of the same kind. It is an
interval by bootstrap, and has the judge's noise in it. Over repeats: how much it would differ if
the same judge judged the same answers again. It is known only from repeats.
"""

import dataclasses
import math

import numpy as np
from scipy import special

LEVEL = 0.95
SAMPLES = 4000  # of the bootstrap
AT_ONCE = 1 << 22  # numbers drawn at a time
POWER = 0.8  # the chance with which the named number of questions would show a difference


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions."""

    mean: float
    low: float
    high: float
    """The 95% interval over questions, by bootstrap; NaN for one question."""
    error: float
    """Standard error over questions; NaN for one question."""
    again: float | None
    """The mean of the same answers, judged again by the same number of repeats, differs by less
    than this in 19 of 20 cases; None: not known, without repeats."""
    judge_share: float | None
    """The share of the judge's noise in the squared standard error; None: not known."""
    questions: int
    """Questions with a verdict."""
    missing: int
    """Judgements without a verdict, of `asked`."""
    asked: int
    least: float
    most: float
    """What the mean would be if each judgement without a verdict were the lowest, or the highest
    possible one."""

    def excludes(self, value: float) -> bool:
        """Whether a value is outside the interval over questions."""
        return not (math.isnan(self.low) or self.low <= value <= self.high)


def estimate(
    values: np.ndarray, least: float, most: float, bounds: tuple[float, float] | None = None
) -> Estimate | None:
    """The mean of judgements (n questions, R repeats), NaN where there is no verdict; None if there
    is none at all. A question's value is the mean of its verdicts.

    Args:
        least, most: the lowest and highest possible judgement.
        bounds: what `Estimate.least` and `most` are, if they do not follow from `values` alone.
    """
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    if not counts.any():
        return None
    has = counts > 0
    sums = np.where(known, values, 0.0).sum(axis=1)
    means = sums[has] / counts[has]
    n = len(means)
    low, high = interval(means, least, most)
    error = float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    again, noise = _noise(values[has], known[has], counts[has])
    share = None
    if noise is not None and error > 0:
        share = min(1.0, noise / error**2)
    if bounds is None:
        lowest, highest = (float(np.where(known, values, end).mean()) for end in (least, most))
        bounds = lowest, highest
    return Estimate(
        float(means.mean()), low, high, error, again, share,
        n, int((~known).sum()), values.size, *bounds,
    )  # fmt: skip


def interval(means: np.ndarray, least: float, most: float) -> tuple[float, float]:
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


def _noise(
    values: np.ndarray, known: np.ndarray, counts: np.ndarray
) -> tuple[float | None, float | None]:
    """(`Estimate.again`, the variance that the judge's noise gives to the mean), from the spread of
    each question's verdicts; (None, None) without repeats. Questions may differ in noise, which
    lowers the degrees of freedom (Satterthwaite 1946)."""
    several = counts > 1
    if not several.any():
        return None, None
    rows = np.where(known, values, np.nan)[several]
    within = np.nanvar(rows, axis=1, ddof=1)
    freedom = counts[several] - 1
    variances = np.full(len(counts), (within * freedom).sum() / freedom.sum())
    variances[several] = within
    parts = variances / counts / len(counts) ** 2
    total = float(parts.sum())
    if total == 0:
        return 0.0, 0.0
    # Questions without repeats take the mean of the others, so their parts grow with these.
    scaled = parts[several] * (total / parts[several].sum())
    degrees = total**2 / float((scaled**2 / freedom).sum())
    reach = float(special.stdtrit(degrees, (1 + LEVEL) / 2))
    return reach * math.sqrt(2 * total), total


def difference(a: np.ndarray, b: np.ndarray, least: float, most: float) -> Estimate | None:
    """The mean of b - a, paired by question. None: no question has verdicts of both."""
    first, second = estimate(a, least, most), estimate(b, least, most)
    if first is None or second is None:
        return None
    bounds = second.least - first.most, second.most - first.least
    return estimate(b - a, least - most, most - least, bounds)


def more_questions(found: Estimate, value: float = 0.0) -> int | None:
    """How many more questions would show, four times in five, that the mean is not `value`, if it
    is what it seems to be. None: there is no number."""
    apart = abs(found.mean - value)
    if not apart or not found.error > 0:
        return None
    reach = float(special.ndtri((1 + LEVEL) / 2) + special.ndtri(POWER))
    needed = found.questions * (reach * found.error / apart) ** 2
    return max(1, math.ceil(needed - found.questions)) if needed < 1e12 else None


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How often two models' answers win."""

    share: Estimate
    """The second model's share of the wins; a tie, or a winner that changes with the order, is
    half a win."""
    first: int
    second: int
    """Pairs that a model won in both orders, or in one with a tie in the other."""
    ties: int
    """Pairs with a tie in both orders."""
    inconsistent: int
    """Pairs of which each order has another winner."""
    unjudged: int
    """Pairs without a verdict in one of the orders."""
    shown_first: Estimate
    """How often the answer that is shown first wins, whoever's it is; 0.5: no position bias."""


def pairs(verdicts: np.ndarray) -> Pairs | None:
    """What (n questions, R repeats, 2 orders) verdicts say: what each gives to the answer shown
    first (1, 0.5 or 0), NaN for none. The first model is shown first in order 0. None: no pair has
    both."""
    wins = np.stack([1 - verdicts[..., 0], verdicts[..., 1]], axis=-1)  # for the second model
    lowest, highest = (float(np.where(np.isnan(wins), end, wins).mean()) for end in (0.0, 1.0))
    share = estimate(wins.mean(axis=-1), 0.0, 1.0, (lowest, highest))
    shown_first = estimate(verdicts.mean(axis=-1), 0.0, 1.0)
    if share is None or shown_first is None:
        return None
    missing = int(np.isnan(verdicts).sum())
    share = dataclasses.replace(share, missing=missing, asked=verdicts.size)
    both = wins[~np.isnan(wins).any(axis=-1)]
    is_split = (both[:, 0] - both[:, 1]).astype(bool) & (both.sum(axis=1) == 1)
    totals = both.sum(axis=1)
    return Pairs(
        share,
        first=int((totals < 1).sum()),
        second=int((totals > 1).sum()),
        ties=int(((totals == 1) & ~is_split).sum()),
        inconsistent=int(is_split.sum()),
        unjudged=int(wins[..., 0].size - len(both)),
        shown_first=shown_first,
    )
