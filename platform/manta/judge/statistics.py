"""Means of judgements, with two kinds of uncertainty that are not mixed up.

Over questions: how much the mean would differ with other questions of the same kind. It is an
interval by bootstrap, and has the judge's noise in it. Over repeats: how much it would differ if
the same judge judged the same answers again. It is known only from repeats.
"""

import dataclasses
import math

import numpy as np

from manta import statistics


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
    if bounds is None:
        known = ~np.isnan(values)
        lowest, highest = (float(np.where(known, values, end).mean()) for end in (least, most))
        bounds = lowest, highest
    missing = int(np.isnan(values).sum())
    noise = _noise(values)
    return _estimate(
        _means(values), None if noise is None else [noise], (least, most), bounds, missing,
        values.size,
    )  # fmt: skip


def difference(a: np.ndarray, b: np.ndarray, least: float, most: float) -> Estimate | None:
    """The mean of b - a, paired by question: each question's mean verdict of `b` minus that of `a`.
    None: no question has verdicts of both."""
    first, second = estimate(a, least, most), estimate(b, least, most)
    if first is None or second is None:
        return None
    noises = [noise for values in (a, b) if (noise := _noise(values)) is not None]
    return _estimate(
        _means(b) - _means(a), noises if len(noises) == 2 else None, (least - most, most - least),
        (second.least - first.most, second.most - first.least),
        first.missing + second.missing, a.size + b.size,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Noise:
    """The judge's noise in each question's mean."""

    variance: np.ndarray
    """(n,) variance of the mean of a question's verdicts."""
    freedom: np.ndarray
    """(n,) degrees of freedom of a question's own variance; 0: it is the mean of the others'."""


def _means(values: np.ndarray) -> np.ndarray:
    """(n,) means of each question's verdicts; NaN for none."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _noise(values: np.ndarray) -> _Noise | None:
    """The judge's noise, from the spread of each question's verdicts; None: no question has two."""
    counts = (~np.isnan(values)).sum(axis=1)
    several = counts > 1
    if not several.any():
        return None
    within = np.nanvar(values[several], axis=1, ddof=1)
    freedom = np.where(several, counts - 1, 0)
    variance = np.full(len(counts), (within * freedom[several]).sum() / freedom.sum())
    variance[several] = within
    return _Noise(variance / np.maximum(counts, 1), freedom)


def _estimate(
    means: np.ndarray,
    noises: list[_Noise] | None,
    ends: tuple[float, float],
    bounds: tuple[float, float],
    missing: int,
    asked: int,
) -> Estimate | None:
    has = ~np.isnan(means)
    means, n = means[has], int(has.sum())
    if not n:
        return None
    low, high = statistics.bootstrap(means, *ends)
    error = float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    again, share = None, None
    if noises is not None:
        variance = np.concatenate([noise.variance[has] for noise in noises]) / n**2
        again = _again(variance, np.concatenate([noise.freedom[has] for noise in noises]))
        share = min(1.0, float(variance.sum()) / error**2) if error > 0 else None
    return Estimate(float(means.mean()), low, high, error, again, share, n, missing, asked, *bounds)


def _again(variance: np.ndarray, freedom: np.ndarray) -> float:
    """`Estimate.again`, for a mean whose variance by the judge's noise is the sum of `variance`.
    Questions may differ in noise, which lowers the degrees of freedom (Satterthwaite 1946)."""
    total, own = float(variance.sum()), freedom > 0
    if not total or not variance[own].sum():
        return 0.0
    # Questions without repeats have the mean of the others, so those stand for them too. (Shares of
    # the sum, as squares of tiny variances would be 0.)
    shares = variance[own] / variance[own].sum()
    degrees = 1 / float((shares**2 / freedom[own]).sum())
    return statistics.quantile((1 + statistics.LEVEL) / 2, degrees) * math.sqrt(2 * total)


def more_questions(found: Estimate, value: float = 0.0) -> int | None:
    """How many more questions would show, four times in five, that the mean is not `value`, if it
    is what it seems to be. None: there is no number."""
    n = found.questions
    needed = statistics.Estimate(found.mean, found.error, n - 1, n).needed(against=value)
    return None if needed is None else needed - n


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
