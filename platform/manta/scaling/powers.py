"""The best learning rate or batch size: among those tried, and as a power law of compute."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from manta.scaling.fit import LEVEL

FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Power:
    """y = scale x^exponent, by least squares over the logarithms."""

    exponent: float
    exponent_low: float
    exponent_high: float
    """The interval of the exponent (Student's t)."""
    centre: tuple[float, float]
    """The mean of log x, and of log y."""
    spread: float
    """Standard deviation of log y around the line."""
    squares: float
    """The sum of the squares of log x around its mean."""
    points: int

    def at(self, x: float) -> tuple[float, float, float]:
        """The line at x, and the interval of the line there."""
        z = math.log(x) - self.centre[0]
        middle = self.centre[1] + self.exponent * z
        half = _quantile(self.points) * self.spread
        half *= math.sqrt(1 / self.points + z * z / self.squares)
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The rate or the batch at which a loss is lowest."""

    value: float
    """The lowest point of the parabola in the logarithm through the best value and its two
    neighbours; the best value itself where it has only one."""
    is_edge: bool
    """Whether the best value is the first or the last one tried, so that a better one may be
    beyond it."""


def optimum(values: Sequence[float], losses: Sequence[float]) -> Optimum:
    """The best of the values tried, each with its loss."""
    pairs = sorted(zip(values, losses, strict=True))
    best = min(range(len(pairs)), key=lambda i: pairs[i][1])
    if best in (0, len(pairs) - 1):
        return Optimum(float(pairs[best][0]), True)
    near = pairs[best - 1 : best + 2]
    z = np.log([value for value, _ in near]) - math.log(near[1][0])
    a, b, _ = np.polyfit(z, [loss for _, loss in near], 2)
    shift = -b / (2 * a) if a > 0 else 0.0  # (a = 0: three equal losses)
    return Optimum(float(near[1][0]) * math.exp(min(max(shift, z[0]), z[2])), False)


def power(x: Sequence[float], y: Sequence[float]) -> Power | None:
    """The power law of these points; None for fewer than three, or for one x alone."""
    if len(x) < FEWEST or len({round(math.log(value), 6) for value in x}) < 2:
        return None
    u, v = np.log(x), np.log(y)
    squares = float(((u - u.mean()) ** 2).sum())
    exponent = float((u - u.mean()) @ (v - v.mean())) / squares
    rest = v - v.mean() - exponent * (u - u.mean())
    spread = math.sqrt(float(rest @ rest) / (len(u) - 2))
    half = _quantile(len(u)) * spread / math.sqrt(squares)
    centre = float(u.mean()), float(v.mean())
    return Power(exponent, exponent - half, exponent + half, centre, spread, squares, len(u))


def _quantile(points: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, points - 2))
