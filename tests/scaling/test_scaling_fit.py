"""The scaling law: exact without noise, as good as a peer with it, and honest intervals."""

import csv
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from manta.scaling.fit import THRESHOLD, Law, _log_loss, fit
from manta.scaling.isoflop import parabola
from manta.scaling.powers import power

LAW = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
KEYS = ("E", "A", "B", "alpha", "beta")

laws = st.builds(
    lambda e, a, b, alpha, beta: Law(e, a * 1e6**alpha, b * 1e7**beta, alpha, beta),
    st.floats(0.5, 3), st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
)  # fmt: skip


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens of a survey, a thousand and two thousand times apart."""
    n, d = np.meshgrid(np.geomspace(1e6, 1e9, side), np.geomspace(1e7, 2e10, side))
    return n.ravel(), d.ravel()


def noisy(seed: int, side: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = grid(side)
    generator = np.random.default_rng(seed)
    return n, d, LAW.loss(n, d) * np.exp(noise * generator.standard_normal(len(n)))


@given(law=laws)
@settings(deadline=None, max_examples=15)
def test_a_law_without_noise_is_found_exactly(law: Law) -> None:
    n, d = grid(5)
    found = fit(n, d, law.loss(n, d)).law
    for key in KEYS:
        assert getattr(found, key) == pytest.approx(getattr(law, key), rel=1e-4), key


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, y = (np.log(v) for v in grid(3))
    p = np.array([0.5, 6.0, 7.6, 0.34, 0.37])
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        slope = (_log_loss(p + step, x, y)[0] - _log_loss(p - step, x, y)[0]) / 2e-6
        assert _log_loss(p, x, y)[1][i] == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_peer_finds_a_lower_objective(seed: int) -> None:
    """scipy's own robust least squares, started at the truth, on a survey with runs that went
    wrong."""
    n, d, loss = noisy(seed, 8)
    loss[::13] *= 1.2
    found = fit(n, d, loss)

    def residuals(p: np.ndarray) -> np.ndarray:
        law = Law(math.exp(p[0]), math.exp(p[1]), math.exp(p[2]), p[3], p[4])
        return np.log(law.loss(n, d)) - np.log(loss)

    truth = [math.log(LAW.E), math.log(LAW.A), math.log(LAW.B), LAW.alpha, LAW.beta]
    peer = optimize.least_squares(residuals, truth, loss="huber", f_scale=THRESHOLD, max_nfev=2000)
    assert found.objective <= peer.cost * (1 + 1e-5)
    assert found.law.alpha == pytest.approx(LAW.alpha, abs=0.03)


def covered(surveys: int, side: int, samples: int) -> dict[str, float]:
    """The share of surveys whose 90% interval has the truth in it, by figure: the parameters, and
    the loss of a run with more of both than any in the survey."""
    n_next, d_next = 3e9, 6e10
    hits = dict.fromkeys((*KEYS, "the next run"), 0)
    for seed in range(surveys):
        n, d, loss = noisy(seed, side)
        found = fit(n, d, loss, samples, seed)
        for key in KEYS:
            low, high = found.interval(lambda law, key=key: getattr(law, key))
            hits[key] += low <= getattr(LAW, key) <= high
        _, low, high = found.prediction(n_next, d_next)
        own = np.random.default_rng(10_000 + seed).standard_normal()
        hits["the next run"] += low <= LAW.loss(n_next, d_next) * math.exp(0.01 * own) <= high
    return {key: count / surveys for key, count in hits.items()}


def test_intervals_of_a_few_surveys_have_the_truth_in_them() -> None:
    assert min(covered(12, 6, 60).values()) >= 0.65  # 0.9 expected; one in 200 is below 0.65


@pytest.mark.long
def test_nine_in_ten_intervals_have_the_truth_in_them() -> None:
    for key, share in covered(200, 12, 200).items():
        assert 0.85 <= share <= 0.95, (key, share)


def test_the_published_law_is_found_in_the_published_points() -> None:
    """Besiroglu et al. 2024, on the 245 points that they read off Chinchilla's figure."""
    file = os.environ.get("MANTA_TEST_CHINCHILLA")
    if not file:
        pytest.skip("MANTA_TEST_CHINCHILLA does not name the file chinchilla_points.csv")
    with open(file) as f:  # noqa: PTH123
        rows = sorted(csv.DictReader(f), key=lambda row: float(row["loss"]))[:-5]
    n, flops, loss = (
        np.array([float(row[key]) for row in rows])
        for key in ("Model Size", "Training FLOP", "loss")
    )
    found = fit(n, flops / (6 * n), loss, samples=4000)
    assert found.objective == pytest.approx(0.00101827, rel=1e-4)
    published = {"A": (482.0, 124.5), "B": (2085.4, 1293.0), "E": (1.8169, 0.0257),
                 "alpha": (0.3478, 0.0154), "beta": (0.3659, 0.0206)}  # fmt: skip
    for key, (value, error) in published.items():
        assert abs(getattr(found.law, key) - value) <= 0.3 * error, key
        assert found.error(lambda law, key=key: getattr(law, key)) == pytest.approx(error, rel=0.1)


@given(law=laws, flops=st.floats(1e15, 1e24), factor=st.floats(0.3, 3))
def test_no_other_size_is_better_at_equal_compute(law: Law, flops: float, factor: float) -> None:
    best = law.best_size(flops)
    other = best * factor
    at_best = law.loss(best, flops / (6 * best))
    assert at_best <= law.loss(other, flops / (6 * other)) + 1e-9


def test_the_parabola_is_biased_without_noise_except_where_the_law_is_even() -> None:
    even = Law(1.7, 400.0, 400.0, 0.35, 0.35)
    assert parabola(even, 1e18).bias == pytest.approx(0, abs=1e-9)
    assert abs(parabola(even, 1e18, 2, 16).bias) > 0.01
    uneven = Law(1.7, 400.0, 4000.0, 0.25, 0.5)
    assert abs(parabola(uneven, 1e18).bias) > 0.05


def test_a_power_law_is_that_of_linear_regression() -> None:
    generator = np.random.default_rng(0)
    x = np.geomspace(1e15, 1e19, 9)
    y = 3.0 * x**-0.12 * np.exp(0.1 * generator.standard_normal(9))
    found = power(list(x), list(y))
    assert found is not None
    peer = stats.linregress(np.log(x), np.log(y))
    assert found.exponent == pytest.approx(peer.slope)
    half = stats.t.ppf(0.95, 7) * peer.stderr
    assert found.exponent_high - found.exponent == pytest.approx(half)
    assert found.at(1e20)[0] == pytest.approx(
        math.exp(peer.intercept + peer.slope * math.log(1e20))
    )
    assert power([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
