"""The fitted rate and the importances of keys, on losses whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.sweep.importance import Importances, importances
from manta.sweep.optimum import Optimum, fit

few = settings(deadline=None, max_examples=30)


def parabola(rate: float, best: float, curvature: float) -> float:
    return 3.0 + curvature * math.log2(rate / best) ** 2


@few
@given(st.floats(1e-4, 1e-1), st.floats(0.001, 1.0), st.floats(-0.45, 0.45), st.integers(1, 3))
def test_the_lowest_point_of_a_parabola_is_found(
    middle: float, curvature: float, shift: float, around: int
) -> None:
    """Exactly, where there is no noise."""
    rates = [middle * 2.0**step for step in range(-around, around + 1)]
    best = middle * 2.0**shift
    found = fit({rate: [parabola(rate, best, curvature)] for rate in rates})
    assert isinstance(found, Optimum)
    assert found.rate == pytest.approx(best, rel=1e-4)
    assert found.loss == pytest.approx(3.0, abs=1e-6)
    assert found.at(middle) == pytest.approx(parabola(middle, best, curvature), abs=1e-6)


def test_the_interval_covers_the_truth_in_19_of_20_fits() -> None:
    """It does so for a parabola so flat that its lowest point is hardly known, too."""
    rates = [2.0**n * 1e-3 for n in range(-2, 3)]
    for curvature in (0.05, 0.005):
        covered = known = 0
        for world in range(300):
            random = np.random.default_rng(world)
            losses = {
                r: [parabola(r, 1.1e-3, curvature) + 0.01 * random.standard_normal()
                    for _ in range(3)]
                for r in rates
            }  # fmt: skip
            if isinstance(found := fit(losses), Optimum):
                known += 1
                covered += found.low <= 1.1e-3 <= found.high
        assert covered >= 0.95 * known - 2.5 * math.sqrt(known * 0.05 * 0.95), (curvature, known)
        assert known > 100


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({1e-3: [3.0], 2e-3: [2.0]}, "2 values ended well, and a parabola needs 3"),
        ({1e-3: [3.0], 2e-3: [2.0], 4e-3: [1.0]}, "at 0.004, and no higher value ended well"),
        ({1e-3: [1.0], 2e-3: [2.0], 4e-3: [3.0]}, "at 0.001, and no lower value ended well"),
        ({1e-3: [3.0], 2e-3: [2.0], 4e-3: []}, "2 values ended well"),
        (
            {1e-3: [3.0], 2e-3: [2.0], 100.0: [9.0]},
            "no higher value within a factor of 8 ended well",
        ),
        ({1e-3: [9.0], 2e-3: [2.0], 4e-3: [2.1], 8e-3: [2.1]}, "too far from a parabola"),
    ],
    ids=str,
)
def test_where_no_parabola_can_be_fitted_the_reason_is_said(
    losses: dict[float, list[float]], said: str
) -> None:
    found = fit(losses)
    assert isinstance(found, str)
    assert said in found


def test_one_seed_at_three_rates_says_nothing_of_the_error() -> None:
    found = fit({1e-3: [3.0], 2e-3: [2.0], 4e-3: [2.5]})
    assert isinstance(found, Optimum)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_a_parabola_that_may_be_flat_has_an_interval_without_end() -> None:
    found = fit({1e-3: [3.0, 2.0], 2e-3: [2.9, 2.0], 4e-3: [2.0, 3.1]})
    assert isinstance(found, Optimum)
    assert (found.low, found.high) == (0.0, math.inf)


def drawn(count: int, seed: int) -> list[dict[str, object]]:
    random = np.random.default_rng(seed)
    return [
        {"a": float(10 ** random.uniform(-4, -1)), "b": int(random.integers(4)), "c": kind}
        for kind in random.choice(["x", "y", "z"], count).tolist()
    ]


def test_the_shares_are_those_of_the_truth() -> None:
    """A loss that is a sum of parts of known variances."""
    trials = drawn(400, 0)
    random = np.random.default_rng(1)
    a = np.array([(math.log10(float(t["a"])) + 2) ** 2 for t in trials])  # type: ignore[arg-type]
    c = np.array([{"x": 0.0, "y": 1.0, "z": 0.5}[str(t["c"])] for t in trials])
    parts = {"a": 2 * a / a.std(), "c": c / c.std()}
    noise = random.standard_normal(len(trials))
    y = parts["a"] + parts["c"] + noise
    found = importances(list(zip(trials, y.tolist(), strict=True)))
    assert isinstance(found, Importances)
    assert found.shares["a"] == pytest.approx(4 / 6, abs=0.06)
    assert found.shares["c"] == pytest.approx(1 / 6, abs=0.06)
    assert found.shares["b"] < 0.02


def test_noise_alone_has_no_importance_where_there_are_enough_trials() -> None:
    """On average, and nearly always less than a third."""
    shares = []
    for seed in range(200):
        trials = drawn(18, seed)
        y = np.random.default_rng(seed + 1000).standard_normal(len(trials))
        found = importances(list(zip(trials, y.tolist(), strict=True)))
        assert isinstance(found, Importances)
        assert found.enough in (17, 18)  # some have not every value
        shares += list(found.shares.values())
    assert np.mean(shares) < 0.08
    assert np.mean(np.array(shares) > 1 / 3) < 0.05


def test_the_shares_do_not_depend_on_how_often_a_value_was_tried() -> None:
    """A key that decides nothing has no share, though its values go with those of another one."""
    trials = [{"a": n, "b": n + n % 2} for n in range(12)]
    found = importances([(t, float(t["a"])) for t in trials])
    assert isinstance(found, Importances)
    assert found.shares["b"] < 1e-6


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([], "0 trials ended well"),
        ([({"a": 1, "b": 2}, 3.0), ({"a": 2, "b": 1}, 2.0)], "the keys have 3 numbers to find"),
        ([({"a": n}, 3.0) for n in range(9)], "all losses are the same"),
    ],
    ids=str,
)
def test_too_few_trials_have_no_importances(
    trials: list[tuple[dict[str, object], float]], said: str
) -> None:
    found = importances(trials)
    assert isinstance(found, str)
    assert said in found
