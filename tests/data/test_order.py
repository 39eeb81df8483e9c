"""The order by property, against its definition, token by token. No Ray, no files."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.orders import (
    ALL,
    DATASET,
    SHARD,
    Case,
    cases,
    make_line,
    read,
    read_batches,
    sequences_of,
    sizes,
    splitmix,
    tokens_of,
)
from manta.data import order as orders
from manta.data.order import (
    Line,
    Order,
    Phase,
    lane_width,
    make_stages,
    permutation,
    stage_of,
    thousandths,
)

few = settings(deadline=None, max_examples=25)

# --- drawing -------------------------------------------------------------------------------------


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
            # The inputs are this many whole epochs, and the first tokens of the next one.
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
            places = np.arange(window.first_sequence, window.first_sequence + count)
            mix = order.datasets(places).reshape(len(whole), -1)
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
            most = min(orders.WIDEST * case.window_tokens, order.total_tokens)
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


@given(st.integers(1, 5000), st.sampled_from([32, 1024, 8192]))
def test_lanes_divide_the_batch_and_are_about_256_or_of_a_fixed_size(
    per_batch: int, seq_len: int
) -> None:
    width = lane_width(per_batch, seq_len)
    wanted = max(orders.LANES, per_batch * seq_len // orders.LANE_TOKENS)
    assert per_batch % width == 0
    assert per_batch // width >= min(per_batch, wanted)
    is_first = orders.version(make_stages({}, seq_len, per_batch * seq_len), seq_len) == 1
    assert is_first == (wanted == orders.LANES)
