"""The learning rate, by property."""

import itertools
import math

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from manta.train.step.schedule import ScheduleConfig, lr_at

few = settings(deadline=None, max_examples=25)

KINDS = st.sampled_from(["cosine", "linear", "wsd"])
FRACTIONS = st.floats(0, 1)
# Steps, peak.
RUNS = (st.integers(2, 300), st.floats(1e-8, 10))


def rates(total: int, peak: float, c: ScheduleConfig) -> list[float]:
    return [lr_at(step, total, peak, c) for step in range(total)]


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


@few
@given(KINDS, *RUNS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_the_rate_is_never_above_its_peak_nor_below_zero(
    kind: str, total: int, peak: float, warmup: float, decay: float, low: float
) -> None:
    c = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, min_lr_ratio=low)
    for rate in rates(total, peak, c):
        assert 0 <= rate <= peak * (1 + 1e-12)


@few
@given(KINDS, *RUNS, st.floats(1e-3, 1), FRACTIONS)
def test_warm_up_is_never_zero_climbs_evenly_and_reaches_the_peak(
    kind: str, total: int, peak: float, warmup: float, low: float
) -> None:
    steps = math.ceil(warmup * total)
    c = ScheduleConfig(kind=kind, warmup=warmup, min_lr_ratio=low)
    climb = rates(total, peak, c)[:steps]
    assert climb[0] > 0
    assert close(climb[-1], peak)
    for step, rate in enumerate(climb):
        assert close(rate, climb[0] * (step + 1))


@few
@given(KINDS, *RUNS, st.floats(0, 0.9), FRACTIONS, FRACTIONS)
def test_the_peak_is_reached_whatever_the_shares(
    kind: str, total: int, peak: float, warmup: float, decay: float, low: float
) -> None:
    c = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, min_lr_ratio=low)
    assert close(max(rates(total, peak, c)), peak)


@few
@given(KINDS, *RUNS, st.floats(0, 0.9), st.floats(0.001, 1), FRACTIONS)
@example("cosine", 2, 1.0, 0.5, 0.2, 0.1)  # one step after warm-up
@example("wsd", 2, 1.0, 0.5, 0.001, 0.1)
@example("cosine", 2, 1.0, 0.0, 0.2, 0.0)
def test_the_last_step_has_the_lowest_rate(
    kind: str, total: int, peak: float, warmup: float, decay: float, low: float
) -> None:
    assume(math.ceil(warmup * total) < total)  # the last step is no part of warm-up
    c = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, min_lr_ratio=low)
    last = lr_at(total - 1, total, peak, c)
    assert close(last, low * peak)


@few
@given(KINDS, *RUNS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_after_warm_up_the_rate_never_rises(
    kind: str, total: int, peak: float, warmup: float, decay: float, low: float
) -> None:
    c = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, min_lr_ratio=low)
    after = rates(total, peak, c)[math.ceil(warmup * total) :]
    for earlier, later in itertools.pairwise(after):
        assert later <= earlier * (1 + 1e-12)


@few
@given(*RUNS, st.floats(0, 0.5), st.floats(0, 0.5), FRACTIONS)
def test_wsd_is_flat_in_the_middle_and_falls_evenly(
    total: int, peak: float, warmup: float, decay: float, low: float
) -> None:
    c = ScheduleConfig(
        kind="wsd", warmup=warmup, decay=decay, decay_shape="linear", min_lr_ratio=low
    )
    start, end = math.ceil(warmup * total), total - math.ceil(decay * total)
    found = rates(total, peak, c)
    assert all(rate == peak for rate in found[start:end])
    fall = found[max(start, end) :]
    drops = [a - b for a, b in itertools.pairwise(fall)]
    assert all(math.isclose(drop, drops[0], rel_tol=1e-6, abs_tol=peak * 1e-12) for drop in drops)


@few
@given(st.integers(4, 300), st.floats(0.01, 1), FRACTIONS)
def test_wsd_falls_by_one_minus_the_root_unless_told_otherwise(
    total: int, decay: float, low: float
) -> None:
    c = ScheduleConfig(kind="wsd", warmup=0.0, decay=decay, min_lr_ratio=low)
    steps = math.ceil(decay * total)
    assume(steps > 1)
    for index, rate in enumerate(rates(total, 1.0, c)[total - steps :]):
        assert close(rate, low + (1 - low) * (1 - math.sqrt(index / (steps - 1))))


@few
@given(*RUNS, st.floats(0, 0.9), FRACTIONS)
def test_linear_is_wsd_that_falls_evenly_from_warm_up_on(
    total: int, peak: float, warmup: float, low: float
) -> None:
    linear = ScheduleConfig(kind="linear", warmup=warmup, min_lr_ratio=low)
    share = 1 - math.ceil(warmup * total) / total
    wsd = ScheduleConfig(
        kind="wsd", warmup=warmup, decay=share, decay_shape="linear", min_lr_ratio=low
    )
    assume(math.ceil(share * total) == total - math.ceil(warmup * total))
    assert rates(total, peak, linear) == rates(total, peak, wsd)


def test_the_shape_of_a_decay_is_for_wsd() -> None:
    (problem,) = ScheduleConfig(kind="cosine", decay_shape="linear").problems()
    assert problem == "decay_shape=linear is for kind=wsd: omit it"


def test_cosine_is_half_way_down_in_the_middle() -> None:
    c = ScheduleConfig(warmup=0.0, min_lr_ratio=0.2)
    assert close(lr_at(50, 101, 1.0, c), 0.6)
    assert [lr_at(step, 101, 1.0, c) for step in (0, 100)] == [1.0, 0.2]


def test_a_run_of_one_step_has_a_rate() -> None:
    for kind in ("cosine", "wsd"):
        assert lr_at(0, 1, 1.0, ScheduleConfig(kind=kind)) > 0


def test_shares_of_wsd_beyond_the_whole_run_are_a_problem() -> None:
    (problem,) = ScheduleConfig(kind="wsd", warmup=0.7, decay=0.5).problems()
    assert problem.startswith("warmup + decay = 1.2")
    assert ScheduleConfig(kind="cosine", warmup=0.7, decay=0.5).problems() == []
