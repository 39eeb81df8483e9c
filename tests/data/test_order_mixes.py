"""Shares of a mix and sizes of batches: how many sequences each dataset gives, and when."""

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.orders import make_line
from manta.data.order import (
    PERIOD,
    Order,
    Phase,
    Stage,
    batches_for,
    make_stages,
    sequences_before,
    stage_of,
    thousandths,
)

few = settings(deadline=None, max_examples=25)

# --- mixes ---------------------------------------------------------------------------------------

weights_of_some = st.lists(st.floats(0, 10) | st.integers(0, 3), min_size=2, max_size=6).filter(
    lambda weights: sum(weights) > 1e-3
)


def mix_order(*phases: tuple[int, Sequence[float]]) -> Order:
    """An order that mixes as many datasets as the phases have weights."""
    lines = tuple(make_line([10_000], 10, key=key) for key in range(len(phases[0][1])))
    mixes = tuple(Phase(start, thousandths(weights)) for start, weights in phases)
    return Order(lines, 0, 10, make_stages({}, 10, 40), mixes)


@few
@given(weights_of_some)
@example([0.7, 0.3])
@example([1, 1, 1])
@example([1, 0, 1e-9])
@example([1e308, 1e308, 3e307])  # their sum is infinite
@example([5e-324, 0])
@example([1, 999])
def test_shares_are_whole_thousandths_each_within_one(weights: list[float]) -> None:
    counts = thousandths(weights)
    assert sum(counts) == PERIOD
    largest = max(weights)
    total = sum(w / largest for w in weights)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - PERIOD * (weight / largest) / total) < 1
        assert weight or not count


def test_shares_that_are_thousandths_are_kept() -> None:
    for weights in ([0.7, 0.3], [0.5, 0.3, 0.2], [0.001, 0.999], [700, 300], [0.1] * 10, [3, 0]):
        exact = [round(PERIOD * w / sum(weights)) for w in weights]
        assert list(thousandths(weights)) == exact


@few
@given(weights_of_some, st.integers(0, 10**12))
@example([1] * 6, 0)
@example([997, 1, 1, 1], 499)
def test_any_thousand_positions_hold_exactly_the_shares_and_any_start_is_within_one(
    weights: list[float], start: int
) -> None:
    order = mix_order((0, weights))
    counts = np.array(thousandths(weights))
    positions = order.datasets(np.arange(start, start + 3 * PERIOD))
    is_of = positions[:, None] == np.arange(len(counts))
    totals = np.concatenate([np.zeros((1, len(counts)), np.int64), is_of.cumsum(0)])
    assert (totals[PERIOD:] - totals[:-PERIOD] == counts).all()

    prefix = np.arange(1, 2 * PERIOD + 1)[:, None] * counts / PERIOD
    given_so_far = (
        order.datasets(np.arange(2 * PERIOD))[:, None] == np.arange(len(counts))
    ).cumsum(0)
    assert np.abs(given_so_far - prefix).max() < 1


@few
@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any), min_size=1, max_size=4
        )
    ),
    st.lists(st.integers(1, 2500), min_size=3, max_size=3, unique=True),
    st.lists(st.integers(0, 6000), min_size=1, max_size=4),
)
def test_a_mix_changes_exactly_at_its_position_and_counts_add_up(
    mixes: list[list[int]], starts: list[int], places: list[int]
) -> None:
    phases = list(zip([0, *sorted(starts)], mixes, strict=False))
    order = mix_order(*phases)
    whole = order.datasets(np.arange(6000))
    stops = [*(start for start, _ in phases[1:]), 6000]
    for (start, weights), stop in zip(phases, stops, strict=True):
        alone = mix_order((0, weights)).datasets(np.arange(stop - start))
        assert np.array_equal(whole[start:stop], alone)
    assert np.array_equal(order.datasets(np.array(places)), order.datasets(np.arange(6001))[places])
    for place, taken in zip(places, order.taken(np.array(places)), strict=True):
        assert np.array_equal(taken, np.bincount(whole[:place], minlength=len(order.lines)))


def test_far_away_positions_are_counted_without_counting() -> None:
    order = mix_order((0, [0.7, 0.3]), (123_456_789, [0.1, 0.9]))
    at = 123_456_789 + 10**15
    first = [700 * 123_456 + 789 * 0.7, 300 * 123_456 + 789 * 0.3]
    (taken,) = order.taken(np.array([at]))
    for found, before, share in zip(taken, first, (0.1, 0.9), strict=True):
        assert abs(found - before - share * 10**15) <= 2
    assert sum(taken) == at


# --- batch sizes ---------------------------------------------------------------------------------

ramps = st.dictionaries(st.integers(1, 12), st.integers(1, 300), max_size=4)


def sizes_by_hand(ramp: dict[int, int], tokens_per_batch: int, count: int) -> list[int]:
    """Tokens in each batch: among the sizes whose time has not ended, the one that ends first."""
    found: list[int] = []
    while len(found) < count:
        open_ones = [(until, size) for size, until in ramp.items() if until > sum(found)]
        found.append(min(open_ones)[1] if open_ones else tokens_per_batch)
    return found


@few
@given(ramps, st.integers(1, 12), st.integers(1, 5))
def test_batch_sizes_are_as_asked_and_all_counts_of_them_agree(
    ramp: dict[int, int], per_batch: int, seq_len: int
) -> None:
    ramp = {size * seq_len: until for size, until in ramp.items()}
    stages = make_stages(ramp, seq_len, per_batch * seq_len)
    tokens = sizes_by_hand(ramp, per_batch * seq_len, 400)
    sequence = 0
    for batch, size in enumerate(tokens):
        assert stage_of(stages, batch).sequences_per_batch * seq_len == size
        assert sequences_before(stages, batch) == sequence
        sequence += size // seq_len
    assert all(a.first_batch < b.first_batch for a, b in itertools.pairwise(stages))
    ends = list(itertools.accumulate(tokens, initial=0))
    for wanted in range(400):
        least = next(k for k, end in enumerate(ends) if end >= wanted)
        assert batches_for(stages, wanted, seq_len) == least


def test_a_ramp_does_not_depend_on_how_it_is_written() -> None:
    for ramp in ({8: 40, 16: 40}, {8: 40, 16: 80, 4: 20}):
        written = {
            make_stages(dict(items), 4, 32) for items in itertools.permutations(ramp.items())
        }
        assert len(written) == 1
    assert make_stages({}, 4, 32) == (Stage(0, 0, 8),)


# --- a mix that comes later ----------------------------------------------------------------------


@few
@given(st.integers(1, 60), st.integers(0, 300))
def test_a_mix_that_comes_after_what_is_planned_changes_nothing_that_was_read(
    batch: int, later: int
) -> None:
    """A resume relies on this, also in the middle of a window."""
    before = mix_order((0, [0.7, 0.3]))
    start = before.sequences_planned(batch) + later
    assert start >= before.sequences_before(batch)
    after = mix_order((0, [0.7, 0.3]), (start, [0.2, 0.8]))
    for window in before.windows(0, batch):
        assert after.window_at(window.first_batch) == window
        for a, b in zip(before.takes(window), after.takes(window), strict=True):
            assert (a.line, a.first) == (b.line, b.first)
            assert np.array_equal(a.rows, b.rows)
