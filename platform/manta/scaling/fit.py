"""The law L = E + A / N^alpha + B / D^beta, fitted to losses of runs, with bootstrap intervals.

For fixed exponents the law is linear in E, A and B. The start is therefore found by variable
projection: non-negative least squares over a grid of exponents. From there, all five minimize the
Huber loss of the log loss (threshold 0.001), as in the replication of Chinchilla by Besiroglu et
al. 2024, so that a few runs that went wrong do not move the law.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

THRESHOLD = 1e-3  # of the Huber loss, in log loss
PARAMETERS = 5
LEVEL = 0.90
GRID = np.linspace(0.05, 1.5, 16)  # exponents at which a start is sought
STARTS = 4  # of the grid's best, each followed to its minimum
# A draw of few sizes may have no finite minimum; what follows from it is infinite then, or NaN.
unbounded = np.errstate(over="ignore", invalid="ignore")


@dataclasses.dataclass(frozen=True)
class Law:
    """The law's parameters; a loss is in nats per token."""

    E: float
    """The loss that no model of any size gets below."""
    A: float
    B: float
    alpha: float
    beta: float

    @unbounded
    def loss(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """The loss of models of `n` parameters after `d` tokens, of their common shape."""
        return self.E + self.A * np.power(n, -self.alpha) + self.B * np.power(d, -self.beta)

    @property
    def size_exponent(self) -> float:
        """The exponent with which the best size grows with compute: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def best_size(self, flops: float) -> float:
        """The N with the lowest loss for C = 6 N D; NaN if it does not fall with both."""
        if min(self.alpha, self.beta) <= 0:
            return math.nan
        ratio = self.alpha * self.A / (self.beta * self.B)
        power = 1 / (self.alpha + self.beta)
        return ratio**power * (flops / 6) ** self.size_exponent


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law, and the laws that other draws of the same runs would have given."""

    law: Law
    objective: float
    """The sum of the Huber losses at the minimum."""
    residuals: np.ndarray
    """log(measured loss) - log(the law's loss), one for each run."""
    draws: tuple[Law, ...]
    """One law for each bootstrap sample."""

    @unbounded
    def error(self, of: Callable[[Law], float]) -> float:
        """Standard error of a figure of the law; NaN without bootstrap samples."""
        values = [of(law) for law in self.draws]
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @unbounded
    def interval(self, of: Callable[[Law], float], level: float = LEVEL) -> tuple[float, float]:
        """The percentile interval of a figure of the law; NaN without bootstrap samples."""
        if not self.draws:
            return math.nan, math.nan
        values = [of(law) for law in self.draws]
        ends = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(ends[0]), float(ends[1])

    @unbounded
    def prediction(
        self, n: float, d: float, level: float = LEVEL, seed: int = 0
    ) -> tuple[float, float, float]:
        """The loss that a run of N and D will have, and the interval for it: that of the law's
        uncertainty and a run's own residual together."""
        generator = np.random.default_rng(seed)
        laws = np.array([float(law.loss(n, d)) for law in self.draws])
        # The fit has taken five degrees of freedom out of the residuals.
        widen = math.sqrt(len(self.residuals) / max(1, len(self.residuals) - PARAMETERS))
        noise = generator.choice(self.residuals, (32, len(laws))) * widen
        low, high = np.quantile(laws * np.exp(noise), [(1 - level) / 2, (1 + level) / 2])
        return float(self.law.loss(n, d)), float(low), float(high)


def fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, samples: int = 0, seed: int = 0) -> Fit:
    """Fits the law to runs with `n` parameters, `d` tokens and `loss` (each of shape (runs,)).

    Args:
        samples: bootstrap samples; each draws as many runs, with replacement.
    """
    x, y, target = np.log(n), np.log(d), np.log(loss)
    ones = np.ones_like(target)
    found = [_minimize(start, x, y, target, ones) for start in _starts(x, y, loss)]
    best, objective = min(found, key=lambda pair: pair[1])
    residuals = target - _log_loss(best, x, y)[0]
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(samples):
        drawn = generator.integers(len(target), size=len(target))
        counts = np.bincount(drawn, minlength=len(target)).astype(float)
        draws.append(_law(_minimize(best, x, y, target, counts)[0]))
    return Fit(_law(best), objective, residuals, tuple(draws))


def _starts(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    """The best points of a grid of exponents, as (log E, log A, log B, alpha, beta)."""
    found = []
    for alpha in GRID:
        for beta in GRID:
            # Centred and divided by the loss: columns of about one size, and relative residuals.
            columns = [np.ones_like(x), np.exp(-alpha * (x - x.mean()))]
            columns.append(np.exp(-beta * (y - y.mean())))
            design = np.stack(columns, axis=1) / loss[:, None]
            part, distance = optimize.nnls(design, np.ones_like(x))
            logs = np.log(np.maximum(part, 1e-6 * loss.min()))
            shift = np.array([0.0, alpha * x.mean(), beta * y.mean()])
            found.append((distance, np.array([*(logs + shift), alpha, beta])))
    found.sort(key=lambda pair: pair[0])
    return [start for _, start in found[:STARTS]]


def _law(p: np.ndarray) -> Law:
    e, a, b, alpha, beta = (float(value) for value in p)
    # A draw of few sizes may have no finite minimum: its terms stay below the largest float.
    e, a, b = (math.exp(min(value, 700.0)) for value in (e, a, b))
    return Law(e, a, b, alpha, beta)


def _log_loss(p: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The law's log loss (runs,), and its gradient by the five parameters (5, runs)."""
    e, a, b, alpha, beta = p
    terms = np.exp(np.stack([np.full_like(x, e), a - alpha * x, b - beta * y]))
    total = terms.sum(axis=0)
    shares = terms / total
    return np.log(total), np.stack([*shares, -x * shares[1], -y * shares[2]])


def _minimize(
    start: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """Minimizes the weighted Huber loss from `start`; returns the parameters and the loss there."""
    mx, my = x.mean(), y.mean()
    x, y = x - mx, y - my  # so that a term's size and its exponent hardly depend on each other
    centre = np.array([start[0], start[1] - start[3] * mx, start[2] - start[4] * my, *start[3:]])

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _log_loss(p, x, y)
        r = (value - target) / THRESHOLD
        size = np.abs(r)
        huber = np.where(size <= 1, 0.5 * r * r, size - 0.5)
        return float(weights @ huber), gradient @ (weights * np.clip(r, -1, 1)) / THRESHOLD

    with np.errstate(over="ignore", invalid="ignore"):  # a step of the line search may be far out
        found = optimize.minimize(
            objective, centre, jac=True, method="BFGS", options={"gtol": 1e-6 * len(x)}
        )
    p = found.x
    p = np.array([p[0], p[1] + p[3] * mx, p[2] + p[4] * my, *p[3:]])
    return p, float(found.fun) * THRESHOLD**2
