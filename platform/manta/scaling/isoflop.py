"""Iso-FLOP curves: losses at equal compute against size, and the parabola that many fit to them.

The parabola in log N is a second-order approximation of a curve that is not symmetric (a power law
falls on one side and another rises on the other), so its lowest point is off even without noise
(arXiv 2603.22339). How far is computed from the fitted law itself.
"""

import dataclasses
import math

import numpy as np

from manta.scaling.fit import Law

WIDTH = 8.0  # the parabola's sizes reach from the best size divided by this to it times this
UNEVEN = (2.0, 16.0)  # the same for a survey that reaches further up than down, as many do
POINTS = 9


@dataclasses.dataclass(frozen=True)
class Parabola:
    """loss = a z^2 + b z + c with z = log N, fitted to an iso-FLOP curve without noise."""

    flops: float
    coefficients: tuple[float, float, float]
    sizes: tuple[float, ...]
    """The sizes that it was fitted to."""
    law_size: float
    """The size at which the law is lowest."""

    @property
    def best_size(self) -> float:
        a, b, _ = self.coefficients
        return math.exp(-b / (2 * a) + math.log(self.law_size))

    @property
    def bias(self) -> float:
        """What the parabola's best size is too large (or, negative, too small) by, as a share."""
        return self.best_size / self.law_size - 1

    def loss(self, n: np.ndarray) -> np.ndarray:
        return np.polyval(self.coefficients, np.log(n) - math.log(self.law_size))


def parabola(law: Law, flops: float, below: float = WIDTH, above: float = WIDTH) -> Parabola:
    """The parabola through the law's own losses for C = 6 N D, at POINTS sizes from `below` times
    smaller than the best to `above` times larger."""
    best = law.best_size(flops)
    sizes = np.geomspace(best / below, best * above, POINTS)
    losses = law.loss(sizes, flops / (6 * sizes))
    a, b, c = (float(v) for v in np.polyfit(np.log(sizes) - math.log(best), losses, 2))
    return Parabola(flops, (a, b, c), tuple(sizes), best)
