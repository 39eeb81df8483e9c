"""The learning rate, by property."""

import itertools
import math

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from manta.train.step.schedule import Extension, ScheduleConfig, lr_at, warmup_steps

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


# --- runs that got another length ----------------------------------------------------------------

LENGTHS = (st.integers(2, 200), st.integers(2, 400), st.floats(0, 1))


def extended(
    length: int, longer: int, place: float, c: ScheduleConfig
) -> tuple[Extension, list[float]]:
    """An extension at this share of a run of `length` steps, and the rates of the whole run that
    then ends at `longer`."""
    step = max(1, min(round(place * length), longer - 1))
    before = rates(length, 1.0, c)[:step]
    extension = Extension(step, before[-1], warmup_steps(length, c))
    return extension, before + [lr_at(at, longer, 1.0, c, extension) for at in range(step, longer)]


@few
@given(KINDS, *LENGTHS, st.floats(0, 0.5), st.floats(0.01, 0.5), FRACTIONS)
@example("cosine", 10, 20, 1.0, 0.1, 0.2, 0.1)  # a run that is finished
@example("wsd", 10, 400, 0.5, 0.1, 0.2, 0.1)  # in the stable phase
def test_an_extended_run_goes_on_from_its_rate_and_ends_at_the_lowest(
    kind: str, length: int, longer: int, place: float, warmup: float, decay: float, low: float
) -> None:
    assume(place * length < longer - 1)
    c = ScheduleConfig(kind=kind, warmup=warmup, decay=decay, min_lr_ratio=low)
    extension, found = extended(length, longer, place, c)
    step, climb = extension.step, extension.warmup_steps
    assert close(lr_at(step - 1, longer, 1.0, c, extension), extension.share)
    if climb < longer:
        assert close(found[-1], low)
    # It climbs as planned before, if it was still climbing, and never rises again.
    assert all(close(rate, (at + 1) / climb) for at, rate in enumerate(found[:climb]))
    for earlier, later in itertools.pairwise(found[max(climb, 1) - 1 :]):
        assert later <= earlier * (1 + 1e-9)


@few
@given(*LENGTHS, st.floats(0, 0.5), st.floats(0.01, 0.5), FRACTIONS)
def test_wsd_stays_where_it_was_until_its_decay_before_the_new_end(
    length: int, longer: int, place: float, warmup: float, decay: float, low: float
) -> None:
    c = ScheduleConfig(kind="wsd", warmup=warmup, decay=decay, min_lr_ratio=low)
    extension, found = extended(length, longer, place, c)
    assume(extension.step >= extension.warmup_steps)
    for rate in found[extension.step : longer - math.ceil(decay * longer)]:
        assert close(rate, extension.share)


@few
@given(st.sampled_from(["cosine", "linear"]), *RUNS, st.floats(0, 0.9), FRACTIONS)
def test_a_run_extended_at_its_peak_is_one_that_had_this_length_from_the_start(
    kind: str, total: int, peak: float, warmup: float, low: float
) -> None:
    c = ScheduleConfig(kind=kind, warmup=warmup, min_lr_ratio=low)
    climb = warmup_steps(total, c)
    assume(0 < climb < total)
    found = [lr_at(at, total, peak, c, Extension(climb, 1.0, climb)) for at in range(total)]
    assert found == rates(total, peak, c)


@few
@given(st.floats(0.2, 0.9), st.floats(0.2, 0.9), st.floats(0, 0.5))
def test_a_cosine_extended_twice_falls_on_from_each_place(
    first: float, second: float, low: float
) -> None:
    c = ScheduleConfig(warmup=0.1, min_lr_ratio=low)
    once, found = extended(100, 200, first, c)
    step = once.step + round(second * (199 - once.step))
    again = Extension(step, found[step - 1], warmup_steps(200, c, once))
    assert again.warmup_steps == 10
    after = [lr_at(at, 300, 1.0, c, again) for at in range(step - 1, 300)]
    assert close(after[0], found[step - 1]) and close(after[-1], low)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(after))
