"""The order by property, against what it has to mean, token by token; and what it costs to plan
and to read. No Ray, no files."""

import contextlib
import dataclasses
import functools
import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.data import order as orders
from manta.data.fingerprint import fingerprint
from manta.data.order import (
    PERIOD,
    Line,
    Order,
    Phase,
    Stage,
    Window,
    batches_for,
    lane_width,
    make_stages,
    permutation,
    sequences_before,
    stage_of,
    thousandths,
)

few = settings(deadline=None, max_examples=25)
SHARD = 10**3  # token `offset` of shard s of dataset d is (d * 1000 + s) * 1000 + offset
DATASET = 10**6
ALL = (PERIOD,)


@contextlib.contextmanager
def sizes(window_tokens: int, block_row_groups: int = 2, lanes: int = 4) -> Iterator[None]:
    """Windows, blocks and lanes that little data fills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW_TOKENS", window_tokens)
        patch.setattr(orders, "BLOCK_ROW_GROUPS", block_row_groups)
        patch.setattr(orders, "LANES", lanes)
        yield


def make_line(shards: Sequence[int], row_group_tokens: int, seed: int = 0, key: int = 0) -> Line:
    return Line(np.array(shards, dtype=np.int64), row_group_tokens, seed, key)


def tokens_of(line: Line, start: int, stop: int) -> np.ndarray:
    """The line's tokens [start, stop), each as its shard and its offset there."""
    pieces = [s.shard * SHARD + np.arange(s.start, s.stop) for s in line.segments(start, stop)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


@functools.lru_cache(maxsize=32)
def first_tokens(line: Line, count: int) -> np.ndarray:
    return tokens_of(line, 0, count)


def sequences_of(line: Line, first: int, count: int, seq_len: int) -> np.ndarray:
    """(count, seq_len + 1): sequences with their last targets, as they stand on the line."""
    start, stop = first * seq_len, (first + count) * seq_len + 1
    tokens = first_tokens(line, 1 << stop.bit_length())[start:stop]
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def read(
    order: Order, window: Window, rank: int = 0, world_size: int = 1, first_batch: int = 0
) -> np.ndarray:
    """(batches, share, seq_len + 1): what a worker reads of a window, each row exactly once."""
    batches = window.stop_batch - max(first_batch, window.first_batch)
    share = window.sequences_per_batch // world_size
    found = np.zeros((batches * share, order.seq_len + 1), dtype=np.int64)
    times = np.zeros(len(found), dtype=np.int64)
    for take in order.takes(window, rank, world_size, first_batch):
        rows = sequences_of(order.lines[take.line], take.first, len(take.rows), order.seq_len)
        assert (take.rows >= -1).all()
        is_own = take.rows >= 0
        found[take.rows[is_own]] = rows[is_own] + take.line * DATASET
        np.add.at(times, take.rows[is_own], 1)
    assert (times == 1).all()
    return found.reshape(batches, share, -1)


def read_batches(order: Order, start: int, stop: int) -> list[np.ndarray]:
    """The global batches [start, stop)."""
    found = [batch for window in order.windows(start, stop) for batch in read(order, window)]
    skipped = start - order.window_at(start).first_batch
    return found[skipped : skipped + stop - start]


@dataclasses.dataclass(frozen=True)
class Case:
    """An order, and the sizes to read it with."""

    order: Order
    world_sizes: list[int]
    window_tokens: int
    block_row_groups: int
    lanes: int

    def sizes(self) -> contextlib.AbstractContextManager[None]:
        return sizes(self.window_tokens, self.block_row_groups, self.lanes)

    def windows(self, positions: int) -> Iterator[Window]:
        """Whole windows, with at least so many positions."""
        for window in self.order.windows(0, 1 << 60):
            if window.first_sequence >= positions:
                return
            yield window


@st.composite
def cases(draw: st.DrawFn, datasets: int = 4) -> Case:
    """One dataset or several; windows of one batch or many, of one lane or many; batches that grow;
    mixes that change; shards of less than a row group, and epochs of less than a batch."""
    seed, seq_len = draw(st.integers(0, 2**63 - 1)), draw(st.integers(1, 7))
    lines = []
    for key in range(draw(st.integers(1, datasets))):
        shards = draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
        lines.append(make_line(shards, draw(st.integers(2, 9)), seed, key))
    workers = draw(st.sampled_from([1, 2, 3, 4, 6]))
    per_batch = st.integers(1, 6).map(lambda n: n * workers)
    untils = draw(st.lists(st.integers(1, 500), max_size=2))
    ramp = {draw(per_batch) * seq_len: until for until in untils}
    stages = make_stages(ramp, seq_len, draw(per_batch) * seq_len)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 700), max_size=2)))]
    weights = st.lists(st.integers(0, 9), min_size=len(lines), max_size=len(lines)).filter(any)
    phases = tuple(Phase(start, thousandths(draw(weights))) for start in starts)
    return Case(
        Order(tuple(lines), seed, seq_len, stages, phases),
        [n for n in (1, 2, 3, 4, 6) if workers % n == 0],
        draw(st.sampled_from([1, 60, 500, 3000])),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 9)),
    )


# --- drawing -------------------------------------------------------------------------------------


def splitmix(x: int) -> int:
    """The finalizer of SplitMix64 in plain integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@few
@given(st.integers(0, 50), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
@example(2, [2**64 - 1])
def test_a_permutation_is_plain_arithmetic_of_its_key(count: int, key: list[int]) -> None:
    state = 0
    for number in key:
        state = splitmix((state + 0x9E3779B97F4A7C15) % 2**64 ^ splitmix(number))
    ranks = [splitmix((state + i) % 2**64) for i in range(count)]
    assert permutation(count, *key).tolist() == sorted(range(count), key=lambda i: ranks[i])


def test_permutations_are_even_and_depend_on_every_number_of_their_key() -> None:
    for keys in (itertools.product(range(7), repeat=4), ((0, n) for n in range(2401))):
        found = Counter(tuple(permutation(4, *key).tolist()) for key in keys)
        even = 2401 / 24
        # Chi-squared with 23 degrees of freedom is beyond this one time in a thousand.
        assert len(found) == 24
        assert sum((n - even) ** 2 / even for n in found.values()) < 49.7
    some = [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (2,), (1 << 32, 2), (1 << 62, 2)]
    assert len({tuple(permutation(20, *key).tolist()) for key in some}) == len(some)


# --- a dataset's line ----------------------------------------------------------------------------

lines = st.builds(
    make_line,
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**48 - 1),
)


@few
@given(lines, st.integers(1, 4))
def test_an_epoch_is_every_token_once_shard_by_shard_block_by_block(line: Line, size: int) -> None:
    everything = [s * SHARD + i for s, count in enumerate(line.shards) for i in range(count)]
    total = line.total_tokens
    with sizes(1, size):
        for epoch in range(3):
            tokens = tokens_of(line, epoch * total, (epoch + 1) * total).tolist()
            assert sorted(tokens) == everything
            shards = [shard for shard, _ in itertools.groupby(tokens, key=lambda t: t // SHARD)]
            assert len(shards) == len(line.shards)
            width = line.row_group_tokens * size
            blocks = itertools.groupby(tokens, key=lambda t: (t // SHARD, t % SHARD // width))
            pieces = [list(block) for _, block in blocks]
            assert len(pieces) == sum(-(-count // width) for count in line.shards.tolist())
            assert all(p == list(range(p[0], p[0] + len(p))) for p in pieces)


@few
@given(lines, st.integers(1, 4), st.tuples(*[st.integers(0, 1500)] * 3))
def test_what_is_read_is_the_same_wherever_it_is_cut(
    line: Line, size: int, places: tuple[int, int, int]
) -> None:
    start, middle, stop = sorted(places)
    with sizes(1, size):
        whole = tokens_of(line, start, stop)
        parts = [tokens_of(line, start, middle), tokens_of(line, middle, stop)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert len(whole) == stop - start
        width = line.row_group_tokens * size
        for s in line.segments(start, stop):
            assert 0 <= s.start < s.stop <= line.shards[s.shard]
            assert s.start // width == (s.stop - 1) // width


def test_epochs_seeds_datasets_and_windows_differ_and_the_same_seed_does_not() -> None:
    def order(seed: int, key: int = 0) -> Order:
        made = make_line([90] * 9, 5, seed, key)
        return Order((made,), seed, 5, make_stages({}, 5, 40), (Phase(0, ALL),))

    with sizes(400):
        line = order(1).lines[0]
        epochs = [tokens_of(line, i * 810, (i + 1) * 810) for i in range(3)]
        others = [tokens_of(order(*other).lines[0], 0, 810) for other in ((2,), (1, 1))]
        for a, b in itertools.combinations([*epochs, *others], 2):
            assert not np.array_equal(a, b)
            # The order of shards differs, and so does that of the blocks in a shard.
            assert (a // SHARD).tolist() != (b // SHARD).tolist()
            in_shard = [t[t // SHARD == 0].tolist() for t in (a, b)]
            assert in_shard[0] != in_shard[1]
        assert np.array_equal(tokens_of(order(1).lines[0], 0, 810), epochs[0])

        shuffles = []
        for made, start in ((order(1), 0), (order(1), 10), (order(2), 0), (order(1, 1), 0)):
            takes = made.takes(made.window_at(start))
            shuffles.append(np.concatenate([take.rows for take in takes]).tolist())
        assert len(shuffles[0]) == 80
        assert shuffles[0] != list(range(80))
        for c, d in itertools.combinations(shuffles, 2):
            assert c != d
        batches = [read_batches(order(seed), 3, 25) for seed in (1, 1, 2)]
        assert np.array_equal(batches[0], batches[1])
        assert not np.array_equal(batches[0], batches[2])


# --- which tokens a batch reads ------------------------------------------------------------------


@few
@given(cases())
def test_each_dataset_gives_its_first_sequences_once_and_each_target_is_the_next_token(
    case: Case,
) -> None:
    order = case.order
    with case.sizes():
        windows = list(case.windows(200))
        found = [row for w in windows for row in read(order, w).reshape(-1, order.seq_len + 1)]
        seen = Counter(tuple(row) for row in np.stack(found).tolist())
        expected: Counter[tuple[int, ...]] = Counter()
        for index, line in enumerate(order.lines):
            count = sum(int(row[0]) // DATASET == index for row in found)
            if not count:
                continue
            rows = sequences_of(line, 0, count, order.seq_len) + index * DATASET
            expected.update(tuple(row) for row in rows.tolist())
            # So many whole epochs have been inputs, and of the next one the first tokens.
            epochs, rest = divmod(count * order.seq_len, line.total_tokens)
            times = Counter(t for row in found for t in row[:-1].tolist() if t // DATASET == index)
            assert sorted(set(times.values()) - {epochs, epochs + 1}) == []
            assert sum(n == epochs + 1 for n in times.values()) == rest
            assert len(times) == (line.total_tokens if epochs else rest)
        assert seen == expected


@few
@given(cases())
def test_any_split_over_workers_is_the_same_batch_slot_by_slot(case: Case) -> None:
    order = case.order
    with case.sizes():
        for window in case.windows(80):
            whole = read(order, window)
            count = len(whole) * window.sequences_per_batch
            mix = order.datasets(window.first_sequence, count).reshape(len(whole), -1)
            assert np.array_equal(whole[:, :, 0] // DATASET, mix)
            for n in case.world_sizes:
                parts = [read(order, window, rank, n) for rank in range(n)]
                assert np.array_equal(np.concatenate(parts, axis=1), whole)


@few
@given(cases(), st.data())
def test_starting_at_a_batch_drops_exactly_those_before_it(case: Case, data: st.DataObject) -> None:
    order = case.order
    with case.sizes():
        batch = data.draw(st.integers(0, 60))
        window = order.window_at(batch)
        n = data.draw(st.sampled_from(case.world_sizes))
        for rank in range(n):
            later = read(order, window, rank, n, batch)
            assert np.array_equal(later, read(order, window, rank, n)[batch - window.first_batch :])


@few
@given(cases())
def test_windows_follow_each_other_and_none_spans_two_batch_sizes(case: Case) -> None:
    order = case.order
    with case.sizes():
        batch = sequence = 0
        for window in case.windows(800):
            assert (window.first_batch, window.first_sequence) == (batch, sequence)
            batches = range(window.first_batch, window.stop_batch)
            assert len(batches) > 0
            assert {order.window_at(b) for b in batches} == {window}
            per_batch = {stage_of(order.stages, b).sequences_per_batch for b in batches}
            assert per_batch == {window.sequences_per_batch}
            sequences = len(batches) * window.sequences_per_batch
            most = min(case.window_tokens, order.total_tokens)
            assert len(batches) == 1 or sequences * order.seq_len <= most
            batch, sequence = batch + len(batches), sequence + sequences
        for start, stop in ((0, batch), (batch // 2, batch), (5, 5)):
            firsts = [w.first_batch for w in order.windows(start, stop)]
            assert firsts == sorted({order.window_at(b).first_batch for b in range(start, stop)})


@few
@given(cases())
def test_a_mix_that_comes_later_changes_no_window_before_it(case: Case) -> None:
    order = case.order
    with case.sizes():
        window = list(case.windows(100))[-1]
        batch, end = window.stop_batch, order.sequences_before(window.stop_batch)
        added = make_line([400] * 5, 3, order.seed, key=99)
        met = [Phase(p.start, (*p.counts, 0)) for p in order.phases if p.start < end]
        other = thousandths([1] * (len(order.lines) + 1))
        expected = read_batches(order, 0, batch)
        for phases in (met, [*met, Phase(end, other)]):
            changed = dataclasses.replace(order, lines=(*order.lines, added), phases=tuple(phases))
            assert changed.window_at(batch - 1) == window
            before = zip(read_batches(changed, 0, batch), expected, strict=True)
            assert all(np.array_equal(a, b) for a, b in before)


@few
@given(cases(), st.integers(0, 100))
def test_the_order_in_which_a_mix_names_its_datasets_plays_no_role(case: Case, draw: int) -> None:
    order = case.order
    turned = np.random.default_rng(draw).permutation(len(order.lines))
    phases = [Phase(p.start, tuple(p.counts[i] for i in turned)) for p in order.phases]
    lines = tuple(order.lines[i] for i in turned)
    other = dataclasses.replace(order, lines=lines, phases=tuple(phases))
    with case.sizes():
        for a, b in zip(read_batches(order, 0, 15), read_batches(other, 0, 15), strict=True):
            place = turned[b // DATASET]
            assert np.array_equal(a, place * DATASET + b % DATASET)


@given(st.integers(1, 5000))
def test_lanes_divide_the_batch_and_are_about_256(per_batch: int) -> None:
    width = lane_width(per_batch)
    assert per_batch % width == 0
    assert per_batch // width >= min(per_batch, orders.LANES)


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
    positions = order.datasets(start, 3 * PERIOD)
    is_of = positions[:, None] == np.arange(len(counts))
    totals = np.concatenate([np.zeros((1, len(counts)), np.int64), is_of.cumsum(0)])
    assert (totals[PERIOD:] - totals[:-PERIOD] == counts).all()

    prefix = np.arange(1, 2 * PERIOD + 1)[:, None] * counts / PERIOD
    given_so_far = (order.datasets(0, 2 * PERIOD)[:, None] == np.arange(len(counts))).cumsum(0)
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
    whole = order.datasets(0, 6000)
    stops = [*(start for start, _ in phases[1:]), 6000]
    for (start, weights), stop in zip(phases, stops, strict=True):
        alone = mix_order((0, weights)).datasets(0, stop - start)
        assert np.array_equal(whole[start:stop], alone)
    for place in places:
        counted = np.bincount(whole[:place], minlength=len(order.lines)).tolist()
        assert order.taken(place) == counted
        assert np.array_equal(
            order.datasets(place, 100)[: 6000 - place], whole[place : place + 100]
        )


def test_far_away_positions_are_counted_without_counting() -> None:
    order = mix_order((0, [0.7, 0.3]), (123_456_789, [0.1, 0.9]))
    at = 123_456_789 + 10**15
    first = [700 * 123_456 + 789 * 0.7, 300 * 123_456 + 789 * 0.3]
    for found, before, share in zip(order.taken(at), first, (0.1, 0.9), strict=True):
        assert abs(found - before - share * 10**15) <= 2
    assert sum(order.taken(at)) == at


# --- batch sizes ---------------------------------------------------------------------------------

ramps = st.dictionaries(st.integers(1, 12), st.integers(1, 300), max_size=4)


def sizes_by_hand(ramp: dict[int, int], tokens_per_batch: int, count: int) -> list[int]:
    """Tokens in each batch: of the sizes that are not over yet, the one that is over first."""
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


# --- what it costs -------------------------------------------------------------------------------

LARGE_SHARD = 1 << 26
SHARDS_OF_TEN_TRILLION = 149_012
ROW_GROUP = 1 << 14
SEQ_LEN = 1024


def large_order(shards: int, per_batch: int, weights: Sequence[float] = (1,)) -> Order:
    line_of = [make_line([LARGE_SHARD] * shards, ROW_GROUP, key=k) for k in range(len(weights))]
    stages = make_stages({}, SEQ_LEN, per_batch * SEQ_LEN)
    return Order(tuple(line_of), 0, SEQ_LEN, stages, (Phase(0, thousandths(weights)),))


def row_groups_read(order: Order, window: Window, world_size: int) -> int:
    """How many row groups all workers together read of a window."""
    count = 0
    for rank in range(world_size):
        touched = set()
        for take in order.takes(window, rank, world_size):
            first, stop = take.first * SEQ_LEN, (take.first + len(take.rows)) * SEQ_LEN + 1
            for s in order.lines[take.line].segments(first, stop):
                groups = range(s.start // ROW_GROUP, -(-s.stop // ROW_GROUP))
                touched |= {(take.line, s.shard, group) for group in groups}
        count += len(touched)
    return count


@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3)], ids=["one", "mix"])
@pytest.mark.parametrize(("per_batch", "workers"), [(512, 64), (480, 48), (2048, 64)])
def test_many_workers_read_hardly_more_together_than_one(
    per_batch: int, workers: int, weights: tuple[float, ...]
) -> None:
    order = large_order(64, per_batch, weights)
    windows = [order.window_at(batch) for batch in (0, 1000, 100_000)]
    counts = {n: sum(row_groups_read(order, w, n) for w in windows) for n in (1, workers)}
    least = sum((w.stop_batch - w.first_batch) * per_batch * SEQ_LEN for w in windows) // ROW_GROUP
    assert least <= counts[1] < 1.1 * least
    assert counts[workers] < 1.3 * counts[1]


def plan(order: Order, batch: int) -> tuple[int, int]:
    """(takes, segments) of the window of a batch."""
    takes = order.takes(order.window_at(batch), first_batch=batch)
    segments = 0
    for take in takes:
        start, stop = take.first * SEQ_LEN, (take.first + len(take.rows)) * SEQ_LEN + 1
        segments += len(order.lines[take.line].segments(start, stop))
    return len(takes), segments


@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3)], ids=["one", "mix"])
def test_a_batch_of_ten_trillion_tokens_is_the_same_work_wherever_it_is(
    weights: tuple[float, ...],
) -> None:
    order = large_order(SHARDS_OF_TEN_TRILLION, 512, weights)
    assert all(line.total_tokens >= 10**13 for line in order.lines)
    work = [plan(order, batch) for batch in (0, 10**6, 10**12)]
    takes, segments = zip(*work, strict=True)
    assert set(takes) == {256 * len(weights)}
    assert max(segments) - min(segments) <= 2 * len(weights)  # where a block happens to begin
    assert max(segments) < 3 * takes[0]


def test_planning_ten_trillion_tokens_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        order = large_order(SHARDS_OF_TEN_TRILLION, 512)
        for batch in (0, 10**6, 10**12):
            plan(order, batch)
        (line,) = order.lines
        for epoch in range(60):  # a run of many does not keep them all
            line.segments(epoch * line.total_tokens, epoch * line.total_tokens + SEQ_LEN)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6


# --- the fingerprint -----------------------------------------------------------------------------


batches = st.tuples(st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**32)).map(
    lambda shape: np.random.default_rng(shape[2]).integers(-1, 60_000, shape[:2])
)


@few
@given(batches, st.integers(0, 10**6))
def test_a_fingerprint_is_the_sum_of_its_places_and_tokens(rows: np.ndarray, slot: int) -> None:
    first = slot * rows.shape[1]
    marks = [splitmix((first + i) * 2**32 + t + 1) for i, t in enumerate(rows.ravel().tolist())]
    assert fingerprint(rows, slot) == sum(marks) % 2**64


@few
@given(batches, st.data())
def test_a_fingerprint_does_not_depend_on_who_has_which_rows(
    rows: np.ndarray, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=3))
    places = [0, *sorted(cuts), len(rows)]
    parts = [fingerprint(rows[a:b], a) for a, b in itertools.pairwise(places)]
    assert sum(parts) % 2**64 == fingerprint(rows, 0)


@few
@given(batches, st.data())
def test_a_fingerprint_changes_with_any_token_and_any_place(
    rows: np.ndarray, data: st.DataObject
) -> None:
    def place() -> tuple[int, int]:
        row, column = (data.draw(st.integers(0, n - 1)) for n in rows.shape)
        return row, column

    before = fingerprint(rows, 3)
    other = rows.copy()
    other[place()] += 1
    assert fingerprint(other, 3) != before
    assert fingerprint(rows, 4) != before
    a, b = place(), place()
    swapped = rows.copy()
    swapped[a], swapped[b] = rows[b], rows[a]
    assert (fingerprint(swapped, 3) == before) == (rows[a] == rows[b])


@few
@given(batches)
def test_a_fingerprint_is_of_the_ids_whatever_their_type(rows: np.ndarray) -> None:
    ignored = rows.astype(np.int32)
    assert fingerprint(ignored, 1) == fingerprint(rows.astype(np.int64), 1)
    ids = np.maximum(rows, 0)
    ids[0, 0] = 65_535
    kinds = ("uint16", "uint32", "int32", "int64")
    assert len({fingerprint(ids.astype(kind), 1) for kind in kinds}) == 1


@few
@given(st.integers(1, 60), st.integers(0, 300))
def test_a_mix_that_comes_after_what_is_planned_changes_nothing_that_was_read(
    batch: int, later: int
) -> None:
    """What a run's resume relies on: also not in the window that it is in the middle of."""
    before = mix_order((0, [0.7, 0.3]))
    start = before.sequences_planned(batch) + later
    assert start >= before.sequences_before(batch)
    after = mix_order((0, [0.7, 0.3]), (start, [0.2, 0.8]))
    for window in before.windows(0, batch):
        assert after.window_at(window.first_batch) == window
        for a, b in zip(before.takes(window), after.takes(window), strict=True):
            assert (a.line, a.first) == (b.line, b.first)
            assert np.array_equal(a.rows, b.rows)
