"""Power laws of one variable: the best learning rate or batch size against compute."""

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
