"""The rate at which the loss would be lowest: a parabola of the loss over the logarithm of the
rate, through the values near the lowest one. Pure arithmetic.

The interval is Fieller's (1954): the rates at which the parabola's slope cannot be told from zero.
It knows that a flat parabola says little about its lowest point; then it has no end.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from manta import statistics
from manta.statistics import Estimate
from manta.sweep.naming import many

FEWEST = 3  # values of a rate, for a parabola
REACH = 8.0  # the loss is a parabola near its lowest point alone: at most this many times the rate
BESIDE = 2  # values on each side of the lowest one; more of them if they are close to it:
CLOSE = 4.0  # at most this many times its rate


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The lowest point of a parabola, and what it is known from."""

    rate: float
    low: float
    """The lower end of the interval at 95%; 0: it has none; nan: no interval is known, as nothing
    says how much losses vary."""
    high: float
    """Its upper end; infinite: it has none; nan: not known."""
    loss: float
    """The loss there, by the parabola."""
    rates: tuple[float, ...]
    """The rates that the parabola goes through."""
    parabola: tuple[float, float, float]
    """c0, c1, c2 of the loss c0 + c1 x + c2 x^2 at x = log2(rate)."""

    def at(self, rate: float) -> float:
        """The parabola's loss at a rate."""
        return float(np.polynomial.Polynomial(self.parabola)(math.log2(rate)))


def fit(losses: Mapping[float, Sequence[float]]) -> Optimum | str:
    """The optimum of a rate.

    Args:
        losses: the final losses at each rate, a number for each seed; a rate whose trials failed
            is left out.

    Returns:
        The optimum; a text that says why there is none, if no parabola can be fitted.
    """
    rates = sorted(rate for rate, values in losses.items() if values)
    if len(rates) < FEWEST:
        return f"{many(len(rates), 'value')} ended well, and a parabola needs {FEWEST}"
    means = {rate: statistics.mean(losses[rate]).value for rate in rates}
    lowest = min(rates, key=means.__getitem__)
    below, above = _near(lowest, rates[::-1]), _near(lowest, rates)
    for side, values, last in (("lower", below, rates[0]), ("higher", above, rates[-1])):
        if not values:
            near = "" if lowest == last else f" within a factor of {REACH:g}"
            return f"the lowest loss is at {lowest:g}, and no {side} value{near} ended well"
    made = _through(sorted([*below, lowest, *above]), losses)
    least, most = min(below[0], lowest / 2), max(above[0], lowest * 2)
    if isinstance(made, Optimum) and not least < made.rate < most:
        return "the losses are too far from a parabola"
    return made


def _near(lowest: float, rates: list[float]) -> list[float]:
    """The rates on one side of the lowest one that a parabola may go through, the nearest
    first. The rates come in the order of that side, past the lowest one."""
    side = rates[rates.index(lowest) + 1 :]
    ratios = [max(rate / lowest, lowest / rate) for rate in side]
    return [
        rate
        for place, (rate, ratio) in enumerate(zip(side, ratios, strict=True))
        if ratio <= (REACH if place < BESIDE else CLOSE)
    ]


def _through(rates: list[float], losses: Mapping[float, Sequence[float]]) -> Optimum | str:
    samples = [losses[rate] for rate in rates]
    middle = float(np.mean(np.log2(rates)))  # where the numbers are small, rounding hardly counts
    x = np.concatenate(
        [np.full(len(s), math.log2(r) - middle) for r, s in zip(rates, samples, strict=True)]
    )
    y = np.concatenate([np.asarray(s, float) for s in samples])
    design = np.stack([np.ones_like(x), x, x**2], 1)
    inverse = np.linalg.inv(design.T @ design)
    c0, c1, c2 = (float(v) for v in inverse @ design.T @ y)
    if c2 <= 0:
        return "the parabola that fits best has no lowest point"
    best = -c1 / (2 * c2)
    variance, degrees = _variance(y - design @ np.array([c0, c1, c2]), samples)
    low, high = _fieller(c1, c2, inverse[1:, 1:] * variance, degrees)
    b1 = c1 - 2 * c2 * middle
    b0 = c0 - c1 * middle + c2 * middle**2
    ends = (2.0 ** (low + middle), 2.0 ** (high + middle))
    rate = 2.0 ** (best + middle)
    return Optimum(rate, *ends, c0 + c1 * best / 2, tuple(rates), (b0, b1, c2))


def _variance(residuals: np.ndarray, samples: list[Sequence[float]]) -> tuple[float, float]:
    """The variance of a loss and its degrees of freedom: from the seeds, or from how far the losses
    lie from the parabola, where that is more. nan: neither is known."""
    sd, degrees = statistics.pooled(samples)
    free = len(samples) - FEWEST
    within = sd**2 * degrees if degrees > 0 else 0.0
    misfit = (float(residuals @ residuals) - within) / free if free else math.nan
    known = [(sd**2, degrees)] if degrees > 0 else []
    known += [(misfit, float(free))] if free else []
    return max(known, default=(math.nan, math.nan))


def _fieller(c1: float, c2: float, covariance: np.ndarray, degrees: float) -> tuple[float, float]:
    """The x at which the slope c1 + 2 c2 x is no different from 0 at 95%."""
    if not np.isfinite(covariance).all():
        return math.nan, math.nan
    t = Estimate(0.0, 1.0, degrees, 2).interval()[1]
    a = 4 * (c2**2 - t**2 * covariance[1, 1])
    b = 4 * (c1 * c2 - t**2 * covariance[0, 1])
    c = c1**2 - t**2 * covariance[0, 0]
    root = b**2 - 4 * a * c
    if a <= 0 or root < 0:  # the curvature itself may be nothing but noise
        return -math.inf, math.inf
    return (-b - math.sqrt(root)) / (2 * a), (-b + math.sqrt(root)) / (2 * a)
