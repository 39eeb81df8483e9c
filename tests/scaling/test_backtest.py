"""The law of the runs of less compute, held against the runs of the most."""

import itertools

import numpy as np
import pytest

from manta.scaling.backtest import backtest
from manta.scaling.fit import Law
from manta.scaling.points import Point

LAW = Law(1.7, 400.0, 2000.0, 0.34, 0.37)


def points(together: float = 0.0) -> list[Point]:
    """Twenty runs on the law; with `together`, size and tokens also lower the loss together."""
    found = []
    for n, d in itertools.product(np.geomspace(1e5, 8e5, 4), np.geomspace(1e6, 1.6e7, 5)):
        both = together * np.log(n / 3e5) * np.log(d / 4e6)
        found.append(Point(f"{n:.0f}-{d:.0f}", n, d, float(LAW.loss(n, d)) * np.exp(-both)))
    return found


def test_runs_on_the_law_are_predicted() -> None:
    found = backtest(points(), samples=20, seed=0)
    assert found is not None
    assert len(found.errors) == 4  # a fifth
    assert max(map(abs, found.errors.values())) < 1e-4
    assert "4 runs of most compute" in found.line
    # The run of most compute has N 8e5 and D 1.6e7; those left have half of one or of the other.
    assert found.reach == pytest.approx(8e5 * 1.6e7 / max(p.n * p.d for p in kept(found.errors)))


def kept(left_out: dict[str, float]) -> list[Point]:
    return [p for p in points() if p.name not in left_out]


def test_runs_that_follow_no_such_law_are_predicted_too_high() -> None:
    found = backtest(points(together=0.03), samples=20, seed=0)
    assert found is not None
    assert max(found.errors.values()) > 0.01
    assert max(found.errors.values()) > abs(min(found.errors.values()))


def test_too_few_runs_are_not_held_against_each_other() -> None:
    two_sizes = [p for p in points() if p.n < 1.5e5 or p.n > 3.5e5]
    few = sorted(points(), key=lambda p: p.flops)[:10]
    assert backtest(few, samples=20, seed=0) is None
    assert backtest(two_sizes[:9], samples=20, seed=0) is None
