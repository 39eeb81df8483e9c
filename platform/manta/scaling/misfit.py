"""A misfit that the law has no term for: size and tokens that help more, or less, together."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from manta.scaling.fit import PARAMETERS
from manta.scaling.points import Point

CLEAR = 3.0  # standard errors
MATTERS = 0.01  # of the loss


@dataclasses.dataclass(frozen=True)
class Misfit:
    """The residuals' slope along log N x log D, as far as N and D alone do not explain it."""

    slope: float
    errors: float
    """The slope in standard errors of its own."""
    centre: tuple[float, float]
    """The means of log N and of log D."""

    def at(self, n: float, d: float) -> float | None:
        """The share by which a run of N and D would miss the law if the slope went on; None: it is
        not clear, or does not matter."""
        x, y = np.log(n) - self.centre[0], np.log(d) - self.centre[1]
        share = float(np.expm1(self.slope * x * y))
        return share if abs(self.errors) > CLEAR and abs(share) > MATTERS else None


def misfit(points: Sequence[Point], residuals: np.ndarray) -> Misfit:
    """The misfit of a law to its points, with `residuals` (runs,) in log loss."""
    x, y = np.log([p.n for p in points]), np.log([p.d for p in points])
    centre = float(x.mean()), float(y.mean())
    x, y = x - x.mean(), y - y.mean()
    alone = np.stack([np.ones_like(x), x, y, x * x, y * y], axis=1)
    z = x * y
    z = z - alone @ np.linalg.lstsq(alone, z, rcond=None)[0]
    size = float(z @ z)
    if size < 1e-9:  # sizes and tokens grow together
        return Misfit(0.0, 0.0, centre)
    slope = float(z @ residuals) / size
    rest = residuals - slope * z
    error = np.sqrt(float(rest @ rest) / max(1, len(rest) - PARAMETERS - 1) / size)
    return Misfit(slope, slope / float(max(error, 1e-12)), centre)
