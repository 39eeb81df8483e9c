"""Pictures of a scaling law: fit, residuals, iso-FLOP curves, and the best size by compute."""

from collections.abc import Sequence
from operator import methodcaller

import numpy as np

from manta import plot
from manta.plot import Look, Series
from manta.scaling.fit import Fit
from manta.scaling.isoflop import UNEVEN, parabola
from manta.scaling.points import Point

NAMES = ("fit.png", "residuals.png", "isoflop.png", "frontier.png")
MOST_LINES = 7  # sizes with a curve of their own; more are drawn in as many groups
BUDGETS = 5
BEYOND = 30.0  # how many times the largest compute the best sizes are drawn to


def draw(found: Fit, points: Sequence[Point], budget: float | None) -> dict[str, bytes]:
    """The pictures as PNG, by file name."""
    drawn = (
        _fit(found, points),
        _residuals(found, points),
        _isoflop(found, points),
        _frontier(found, points, budget),
    )
    return dict(zip(NAMES, drawn, strict=True))


def _groups(points: Sequence[Point]) -> list[tuple[float, list[Point]]]:
    """The points by size, smallest first, with the size; neighbouring sizes share a group if there
    are too many."""
    sizes = sorted({p.n for p in points})
    if len(sizes) <= MOST_LINES:
        return [(n, [p for p in points if p.n == n]) for n in sizes]
    ends = np.geomspace(sizes[0], sizes[-1], MOST_LINES + 1)
    where = np.clip(
        np.searchsorted(ends, [p.n for p in points], side="right") - 1, 0, MOST_LINES - 1
    )
    found = []
    for group in range(MOST_LINES):
        inside = [p for p, i in zip(points, where, strict=True) if i == group]
        if inside:
            found.append((float(np.exp(np.mean([np.log(p.n) for p in inside]))), inside))
    return found


def _fit(found: Fit, points: Sequence[Point]) -> bytes:
    series = []
    tokens = [p.d for p in points]
    along = np.geomspace(min(tokens), max(tokens), 60)
    is_grouped = len({p.n for p in points}) > MOST_LINES
    for color, (n, inside) in enumerate(_groups(points)):
        label = f"N {'near ' if is_grouped else ''}{plot.short(n)}"
        series.append(Series(label, along, found.law.loss(n, along), "line", color))
        series.append(Series("", [p.d for p in inside], [p.loss for p in inside], "points", color))
    return plot.chart(
        series, "Loss against tokens: runs, and the law", "tokens", "loss", log_y=True
    )


def _residuals(found: Fit, points: Sequence[Point]) -> bytes:
    order = {id(p): r for p, r in zip(points, found.residuals, strict=True)}
    series = [
        Series(f"N near {plot.short(n)}", [p.flops for p in inside],
               [100 * order[id(p)] for p in inside], "points", color)
        for color, (n, inside) in enumerate(_groups(points))
    ]  # fmt: skip
    ends = [min(p.flops for p in points), max(p.flops for p in points)]
    series.append(Series("the law", ends, [0, 0], "dashed", None))
    return plot.chart(
        series, "Residuals: measured loss over the law's", "training FLOPs, 6 N D", "percent"
    )


def _isoflop(found: Fit, points: Sequence[Point]) -> bytes:
    flops = [p.flops for p in points]
    series = []
    for color, budget in enumerate(np.geomspace(min(flops), max(flops), BUDGETS)):
        curve = parabola(found.law, float(budget), *UNEVEN)
        n = np.geomspace(curve.sizes[0] / 4, curve.sizes[-1], 60)
        series.append(_line(f"{budget:.1e} FLOPs", found, n, budget, "line", color))
        n = n[n >= curve.sizes[0]]
        series.append(Series("", n, curve.loss(n), "dashed", None))
        both = np.array([curve.law_size, curve.best_size])
        series.append(_line("", found, both[:1], budget, "points", color))
        series.append(Series("", both[1:], curve.loss(both[1:]), "points", None))
    label = f"parabola (lowest: {curve.bias:+.0%})"
    series.append(Series(label, [], [], "dashed", None))
    title = "Loss at equal compute: the law, and the parabola fitted to it"
    return plot.chart(series, title, "parameters N", "loss", log_y=True)


def _line(label: str, found: Fit, n: np.ndarray, flops: float, look: Look, color: int) -> Series:
    """The law at equal compute."""
    return Series(label, n, found.law.loss(n, flops / (6 * n)), look, color)


def _frontier(found: Fit, points: Sequence[Point], budget: float | None) -> bytes:
    flops = [p.flops for p in points]
    along = np.geomspace(min(flops), max(BEYOND * max(flops), 2 * (budget or 0)), 40)
    n = np.array([found.law.best_size(c) for c in along])
    low, high = np.array([found.interval(methodcaller("best_size", c)) for c in along]).T
    series = [
        Series("best parameters N", along, n, "line", 0),
        Series("90% interval", along, low, "dashed", 0),
        Series("", along, high, "dashed", 0),
        Series("best tokens D", along, along / (6 * n), "line", 1),
        Series("runs: N", flops, [p.n for p in points], "points", 0),
    ]
    if budget is not None:
        best = found.law.best_size(budget)
        series.append(
            Series("the budget", [budget, budget], [best, budget / (6 * best)], "points", 3)
        )
    return plot.chart(
        series, "Best size and tokens for each compute", "training FLOPs, 6 N D", "N, D", log_y=True
    )
