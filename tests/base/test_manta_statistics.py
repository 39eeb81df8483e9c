"""Estimates and tests: against scipy's own, and against what simulated values show."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from manta import statistics

few = settings(deadline=None, max_examples=40)
numbers = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=30)


@few
@given(a=numbers, b=numbers)
def test_p_values_and_intervals_of_differences_are_scipys(a: list[float], b: list[float]) -> None:
    assume(np.std(a) + np.std(b) > 0)
    found, theirs = statistics.welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert found.p_value() == pytest.approx(theirs.pvalue)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval()))
    pairs = list(zip(a, b, strict=False))
    assume(np.std([y - x for x, y in pairs]) > 0)
    first, second = map(list, zip(*pairs, strict=True))
    paired, its = statistics.paired(first, second), stats.ttest_rel(second, first)
    assert paired.p_value() == pytest.approx(its.pvalue)
    assert paired.interval() == pytest.approx(tuple(its.confidence_interval()))


@few
@given(numbers)
def test_the_ratio_of_values_of_equal_weight_is_their_mean(values: list[float]) -> None:
    mean, ratio = statistics.mean(values), statistics.ratio(values, [1.0] * len(values))
    assert ratio.value == pytest.approx(mean.value, abs=1e-12)
    assert ratio.error == pytest.approx(mean.error)


def test_one_value_says_nothing_of_others_and_values_without_spread_all() -> None:
    one = statistics.mean([2.0])
    assert math.isnan(one.error) and math.isnan(one.p_value()) and one.more() is None
    alike = statistics.welch([2.0, 2.0], [2.5, 2.5])
    assert alike.p_value() == 0 and alike.interval() == (0.5, 0.5) and alike.more() == 0
    assert statistics.mean([0.0, 0.0]).p_value() == 1 and statistics.mean([0.0, 0.0]).more() is None


@pytest.mark.parametrize("wrong", [([1.0], [1.0, 2.0]), ([], [])])
def test_values_that_are_not_pairs_are_refused(wrong: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError):
        statistics.paired(*wrong)


@pytest.mark.parametrize("apart", [0.2, 0.7, 3.0])
def test_so_many_more_values_show_it_four_times_in_five(apart: float) -> None:
    """The power of the t-test is that of the noncentral t distribution."""
    found = statistics.Estimate(apart, 1 / math.sqrt(3), 2, 3)
    more = found.more()
    assert more is not None
    assert more == 0 or power(apart, 3 + more) == pytest.approx(0.8, abs=0.06)
    assert more == 0 or power(apart, 3 + more - 1) < 0.82


def power(apart: float, count: int) -> float:
    limit, centre = stats.t.ppf(0.975, count - 1), apart * math.sqrt(count)
    return float(stats.nct.sf(limit, count - 1, centre) + stats.nct.cdf(-limit, count - 1, centre))


def test_a_difference_of_nothing_needs_no_number_of_values() -> None:
    assert statistics.Estimate(1e-9, 1.0, 9, 10).more() is None


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holms_p_values_keep_their_order_and_are_at_most_bonferronis(p: list[float]) -> None:
    adjusted = statistics.holm(p)
    for a, b in zip(p, adjusted, strict=True):
        assert a <= b <= min(1.0, len(p) * a)
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    assert adjusted[order[0]] == pytest.approx(min(1.0, len(p) * p[order[0]]))


def test_holm_passes_over_what_is_not_known() -> None:
    adjusted = statistics.holm([0.01, math.nan, 0.04])
    assert adjusted[0] == 0.02 and math.isnan(adjusted[1]) and adjusted[2] == 0.04


@pytest.mark.parametrize(("groups", "size"), [(2, 3), (3, 2)])
def test_the_best_of_equals_is_called_best_at_most_1_time_in_20(groups: int, size: int) -> None:
    rng, false, further = np.random.default_rng(groups), 0, 0
    for _ in range(100):
        values = rng.normal(size=(groups, size))
        found = statistics.against_best(
            values.mean(axis=1).tolist(), [size] * groups, *statistics.pooled(values.tolist())
        )
        order = np.argsort(values.mean(axis=1))
        false += found[order[1]] < 0.05
        further += any(found[i] < 0.05 for i in order[2:])
    assert false <= 12 and further <= 12  # 5, and three standard errors


def test_a_best_that_is_far_ahead_is_called_best() -> None:
    found = statistics.against_best([2.0, 3.0, 3.1], [3, 3, 3], 0.1, 6)
    assert found[0] == 1 and max(found[1:]) < 0.001
    assert math.isnan(statistics.against_best([2.0, 3.0], [1, 1], math.nan, 0)[1])


def test_a_few_large_differences_do_not_decide_the_rank_test() -> None:
    differences = [-1.0] * 30 + [500.0] * 2
    assert statistics.mean(differences).value > 0
    assert statistics.wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert statistics.wilcoxon(differences) < 0.01 and statistics.wilcoxon([0.0, 0.0]) == 1


@few
@given(st.integers(0, 60), st.integers(0, 60))
def test_wilsons_interval_has_its_share_and_mcnemars_test_is_even_handed(a: int, b: int) -> None:
    assert statistics.mcnemar(a, b) == pytest.approx(statistics.mcnemar(b, a))
    assume(a + b)
    found, n, z = statistics.wilson(a, a + b), a + b, stats.norm.ppf(0.975)
    assert found.low <= found.value <= found.high
    for limit in (found.low, found.high):  # where the share is z standard errors away
        assert abs(found.value - limit) == pytest.approx(
            z * math.sqrt(limit * (1 - limit) / n), abs=1e-9
        )
    tail = sum(math.comb(n, i) for i in range(min(a, b) + 1)) / 2**n
    assert statistics.mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
