"""A law's test on its own runs: fitted to those of less compute, it predicts those of the most."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from manta.errors import DataError
from manta.scaling.fit import LEVEL, fit
from manta.scaling.points import Point, check

SHARE = 0.2  # of the runs is predicted
FEWEST = 3  # runs to predict


@dataclasses.dataclass(frozen=True)
class Backtest:
    """How the law of the other runs predicts the runs of most compute."""

    errors: dict[str, float]
    """The predicted loss over the measured one, less 1, by run."""
    inside: int
    """How many of the losses are in the interval of their prediction."""
    reach: float
    """The most compute of these runs, over the most of the others."""

    @property
    def line(self) -> str:
        middle = statistics.median(self.errors.values())
        worst, error = max(self.errors.items(), key=lambda item: abs(item[1]))
        return (
            f"checked on itself: fitted without the {len(self.errors)} runs of most compute (up to "
            f"{self.reach:.2g} times that of the others), the law's losses for them are "
            f"{middle:+.1%} off (median; {error:+.1%} at most, {worst}); {self.inside} of "
            f"{len(self.errors)} are in the {LEVEL:.0%} interval"
        )


def backtest(points: Sequence[Point], samples: int, seed: int) -> Backtest | None:
    """Fits the law without the fifth of the points that has most compute, and predicts these.

    Args:
        samples: bootstrap samples of the fit.

    Returns:
        None if the other points are too few for a law.
    """
    ordered = sorted(points, key=lambda p: p.flops)
    count = max(FEWEST, round(SHARE * len(ordered)))
    rest, left_out = ordered[:-count], ordered[-count:]
    try:
        check(rest)
    except DataError:
        return None
    n, d, loss = (np.array([getattr(p, key) for p in rest]) for key in ("n", "d", "loss"))
    found = fit(n, d, loss, samples, seed)
    errors, inside = {}, 0
    for point in left_out:
        predicted, low, high = found.prediction(point.n, point.d)
        errors[point.name] = predicted / point.loss - 1
        inside += low <= point.loss <= high
    return Backtest(errors, inside, left_out[-1].flops / rest[-1].flops)
