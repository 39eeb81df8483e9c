"""Orders of small data, and their batches token by token."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import strategies as st

from manta.data import order as orders
from manta.data.order import (
    PERIOD,
    Line,
    Order,
    Phase,
    Window,
    make_stages,
    thousandths,
)

SHARD = 10**3  # token `offset` of shard s of dataset d is (d * 1000 + s) * 1000 + offset
DATASET = 10**6
ALL = (PERIOD,)


@contextlib.contextmanager
def sizes(
    window_tokens: int, block_row_groups: int = 2, lanes: int = 4, lane_tokens: int = 1 << 12
) -> Iterator[None]:
    """Sets windows, blocks and lanes that a little data fills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW_TOKENS", window_tokens)
        patch.setattr(orders, "BLOCK_ROW_GROUPS", block_row_groups)
        patch.setattr(orders, "LANES", lanes)
        patch.setattr(orders, "LANE_TOKENS", lane_tokens)
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
    """Sequences with their last targets, as they stand on the line: (count, seq_len + 1)."""
    start, stop = first * seq_len, (first + count) * seq_len + 1
    tokens = first_tokens(line, 1 << stop.bit_length())[start:stop]
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def read(
    order: Order, window: Window, rank: int = 0, world_size: int = 1, first_batch: int = 0
) -> np.ndarray:
    """The rows that a worker reads of a window, each exactly once: (batches, share, seq_len +
    1)."""
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
    lane_tokens: int

    def sizes(self) -> contextlib.AbstractContextManager[None]:
        return sizes(self.window_tokens, self.block_row_groups, self.lanes, self.lane_tokens)

    def windows(self, positions: int) -> Iterator[Window]:
        """Whole windows, together with at least this many positions."""
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
        draw(st.sampled_from([1, 10, 1 << 12])),
    )


def splitmix(x: int) -> int:
    """The finalizer of SplitMix64 in plain integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
