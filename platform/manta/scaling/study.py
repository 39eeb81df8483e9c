"""A study: gathers points, fits the law, recommends, files a prediction or checks one."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from manta import layout, ownership, storage
from manta.errors import DataError
from manta.plot import short
from manta.scaling import pictures, predictions
from manta.scaling.backtest import Backtest, backtest
from manta.scaling.fit import LEVEL, Fit, fit
from manta.scaling.isoflop import UNEVEN, WIDTH, parabola
from manta.scaling.points import Point, gather
from manta.scaling.recommend import Tried, predict, recommend
from manta.scaling.settings import ScalingConfig
from manta.terminal import aligned

COUNTED = {
    "all": "all parameters of the model",
    "no_embeddings": "the parameters outside the token and position embeddings",
    "file": "what the CSV file counts (only its author knows which parameters)",
}
LARGEST = 0.2  # the share of the runs that are the largest
FAR = 2.5  # standard errors of their mean residual, beyond which the law does not fit them
NOTHING = 0.01  # of the lowest loss measured, below which E is as good as 0
UNSURE = 100.0  # ends of an interval of the best size, against each other
CHECK_SAMPLES = 400  # bootstrap samples of the check, whose interval need not be as exact
PARAMETERS = ("E", "A", "B", "alpha", "beta")


def study(c: ScalingConfig, trained: Sequence[str] = ()) -> tuple[list[str], str | None]:
    """The lines to show, and the folder with the pictures; None if only a prediction was checked.

    Args:
        trained: the names of a ladder's runs.

    Raises:
        MantaError: what is asked for cannot be done; nothing is written then.
    """
    folder = layout.scaling_folder(c.home_folder, c.name)
    if c.check is not None:
        return predictions.check(folder, c.check, c.home_folder), None
    points, inputs = gather(dataclasses.replace(c, runs=(*c.runs, *trained)))
    n, d, loss = (np.array([getattr(p, key) for p in points]) for key in ("n", "d", "loss"))
    found = fit(n, d, loss, c.samples, c.seed)
    if min(found.law.alpha, found.law.beta) <= 0:
        raise DataError(
            f"the losses of these {len(points):,} runs do not fall with size and tokens (alpha "
            f"{found.law.alpha:.3g}, beta {found.law.beta:.3g}): add runs of other sizes and tokens"
        )
    checked = backtest(points, min(c.samples, CHECK_SAMPLES), c.seed)
    count = "file" if c.points is not None else c.count
    lines = [*_table(found, points, count), *([checked.line] if checked else [])]
    lines += ["", *_isoflop(found, points), *_doubts(found, points)]
    tried = Tried.of(points)
    lines += tried.lines()
    budget = c.budget.in_flops
    if budget is not None:
        lines += ["", *recommend(found, points, c, tried)]
    ownership.refuse_links(folder, [*pictures.NAMES, layout.LAW])
    lines += predict(found, c, folder, count, inputs, tried, points)
    drawn = pictures.draw(found, points, budget)
    with storage.writing(folder, "free some space there, then run the same command again"):
        for name, data in drawn.items():
            storage.write_bytes(storage.join(folder, name), data)
        facts = _facts(found, points, count, inputs, checked)
        storage.write_json(storage.join(folder, layout.LAW), facts)
    return lines, folder


def _table(found: Fit, points: Sequence[Point], count: str) -> Iterator[str]:
    yield f"L = E + A / N^alpha + B / D^beta, from {len(points):,} runs; N is {COUNTED[count]}"
    rows = [["", "value", "standard error", f"{LEVEL:.0%} interval"]]
    for key in PARAMETERS:
        low, high = found.interval(attrgetter(key))
        error = found.error(attrgetter(key))
        rows.append(
            [key, _four(getattr(found.law, key)), _four(error), f"{_four(low)} to {_four(high)}"]
        )
    low, high = found.interval(lambda law: law.size_exponent)
    error = found.error(lambda law: law.size_exponent)
    rows.append(
        [
            "best N ~ C^",
            _four(found.law.size_exponent),
            _four(error),
            f"{_four(low)} to {_four(high)}",
        ]
    )
    yield from aligned(rows)
    sizes = np.abs(np.expm1(found.residuals))
    worst = int(sizes.argmax())
    yield (
        f"residuals: median {np.median(sizes):.2%}, largest {sizes[worst]:.2%} "
        f"({points[worst].name}, N {short(points[worst].n)}, D {short(points[worst].d)})"
    )
    both = [p for p in points if p.other_n is not None]
    if both:
        other = "without embeddings" if count == "all" else "with embeddings"
        each = ", ".join(sorted({f"{short(p.n)} ({short(p.other_n or 0)} {other})" for p in both}))
        yield f"N of the runs: {each}"


def _four(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _doubts(found: Fit, points: Sequence[Point]) -> Iterator[str]:
    """Lines that say what these runs hardly tell (the lowest loss, the best size), and where the
    law does not fit them."""
    lowest = found.law.E
    if lowest < NOTHING * min(p.loss for p in points):
        yield (
            f"these runs do not tell the loss that no model gets below (E is {lowest:.2g}): they "
            "are far above it, or do not follow the law, so it is unsure of much larger runs"
        )
    order = np.argsort([p.flops for p in points])
    rest, largest = np.split(found.residuals[order], [-max(3, round(LARGEST * len(points)))])
    mean, error = largest.mean(), rest.std() / math.sqrt(len(largest))
    if abs(mean) > FAR * error:
        yield (
            f"the {len(largest)} runs of most compute are {abs(mean):.1%} "
            f"{'above' if mean > 0 else 'below'} the law, which is more than scatter: larger runs "
            f"will be further {'above' if mean > 0 else 'below'} what it says"
        )
    flops = max(p.flops for p in points)
    low, high = found.interval(lambda law: law.best_size(flops))
    if not high <= UNSURE * low:
        yield (
            f"these runs hardly tell which size is best at {flops:.2e} FLOPs: the {LEVEL:.0%} "
            f"interval is {low:.2g} to {high:.2g}; add runs of other sizes and other tokens"
        )


def _isoflop(found: Fit, points: Sequence[Point]) -> Iterator[str]:
    flops = max(p.flops for p in points)
    even = parabola(found.law, flops)
    skew = parabola(found.law, flops, *UNEVEN)
    yield (
        f"at {flops:.2e} FLOPs the law is lowest at N = {short(even.law_size)}. A parabola through "
        f"its own losses, without noise, says {short(even.best_size)} ({even.bias:+.0%}) from "
        f"sizes {WIDTH:g} times smaller to {WIDTH:g} times larger, and {short(skew.best_size)} "
        f"({skew.bias:+.0%}) from {UNEVEN[0]:g} times smaller to {UNEVEN[1]:g} times larger: that "
        "is its bias"
    )


def _facts(
    found: Fit,
    points: Sequence[Point],
    count: str,
    inputs: dict[str, str],
    checked: Backtest | None,
) -> dict[str, Any]:
    """What fit.json has."""
    figures = {}
    for key in PARAMETERS:
        low, high = found.interval(attrgetter(key))
        error = found.error(attrgetter(key))
        value = getattr(found.law, key)
        figures[key] = {"value": value, "error": error, "low": low, "high": high}
    rows = [
        {**dataclasses.asdict(p), "residual": float(r)}
        for p, r in zip(points, found.residuals, strict=True)
    ]
    return {
        "law": figures, "level": LEVEL, "samples": len(found.draws), "objective": found.objective,
        "count": count, "inputs": inputs, "points": rows,
        "checked_on_itself": None if checked is None else dataclasses.asdict(checked),
    }  # fmt: skip
