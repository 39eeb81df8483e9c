"""The cost of planning the order of ten trillion tokens, and of reading it with many workers."""

import tracemalloc
from collections.abc import Sequence

import pytest

from helpers.orders import make_line
from manta.data.order import (
    Order,
    Phase,
    Window,
    make_stages,
    thousandths,
)

LARGE_SHARD = 1 << 26
SHARDS_OF_TEN_TRILLION = 149_012
ROW_GROUP = 1 << 14
SEQ_LEN = 1024


def large_order(shards: int, per_batch: int, weights: Sequence[float] = (1,)) -> Order:
    line_of = [make_line([LARGE_SHARD] * shards, ROW_GROUP, key=k) for k in range(len(weights))]
    stages = make_stages({}, SEQ_LEN, per_batch * SEQ_LEN)
    return Order(tuple(line_of), 0, SEQ_LEN, stages, (Phase(0, thousandths(weights)),))


def row_groups_read(order: Order, window: Window, world_size: int) -> int:
    """The number of row groups that all workers together read of a window."""
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
    """The takes and segments of the window of a batch."""
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
        for epoch in range(60):  # a run of many windows does not keep them all
            line.segments(epoch * line.total_tokens, epoch * line.total_tokens + SEQ_LEN)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6
