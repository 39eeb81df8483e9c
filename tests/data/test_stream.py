"""The stream over real Ray, against the order's arithmetic over tokens that pyarrow reads."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.datasets import write_dataset
from manta.data import stream
from manta.data.manifest import Manifest, Shard
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Order, Phase, make_stages
from manta.data.packing import count_cuts
from manta.data.shards import ShardWriter
from manta.errors import DataError

few = settings(deadline=None, max_examples=25)

SEQ_LEN = 16
PER_BATCH = 12
GROUP = 32
EOT = 7


def make_dataset(folder: Path, seed: int, tokens: int = 3000) -> Manifest:
    """Two train shards and a val shard of random ids, with an end-of-text token in every ten."""
    draw = np.random.default_rng(seed)
    shards = []
    for name, split, count in (
        ("train-00000", "train", tokens // 3),
        ("train-00001", "train", tokens - tokens // 3),
        ("val-00000", "val", 500),
    ):
        ids = draw.integers(8, 1000, count).astype(np.uint16)
        ids[draw.random(count) < 0.1] = EOT
        ids[-1] = EOT
        writer = ShardWriter(str(folder / f"{name}.parquet"), ids.dtype, GROUP)
        writer.write(ids)
        shards.append(
            Shard(f"{name}.parquet", split, 1, count, count, 999, *writer.close())  # type: ignore[arg-type]
        )
    return Manifest(str(folder), {}, "none", "", 1000, EOT, "uint16", GROUP, {}, {}, tuple(shards))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    first, second = (make_dataset(tmp_path_factory.mktemp(f"data{i}"), i) for i in (1, 2))
    return first, second


def order_over(datasets: tuple[Manifest, ...], *, seed: int = 5) -> Order:
    """An order with about 15 batches per epoch and, given the size of the data, per window."""
    phase = Phase(0, (PERIOD,)) if len(datasets) == 1 else Phase(0, (700, 300))
    stages = make_stages({}, SEQ_LEN, SEQ_LEN * PER_BATCH)
    return make_order(datasets, (phase,), stages, seed, SEQ_LEN)


def expected(datasets: tuple[Manifest, ...], order: Order, start: int, stop: int) -> np.ndarray:
    """The rows of batches [start, stop), read with pyarrow alone."""
    lines = [
        [pq.read_table(f"{m.path}/{shard.file}")["tokens"].to_numpy() for shard in m.split("train")]
        for m in datasets
    ]
    found = []
    for window in order.windows(0, stop):
        batches = window.stop_batch - window.first_batch
        rows = np.zeros((batches * PER_BATCH, SEQ_LEN + 1), dtype=np.uint16)
        for take in order.takes(window):
            for i, row in enumerate(take.rows):
                begin = (take.first + i) * SEQ_LEN
                segments = order.lines[take.line].segments(begin, begin + SEQ_LEN + 1)
                pieces = [lines[take.line][s.shard][s.start : s.stop] for s in segments]
                rows[row] = np.concatenate(pieces)
        found.append(rows)
    return np.concatenate(found)[start * PER_BATCH : stop * PER_BATCH]


def streamed(
    datasets: tuple[Manifest, ...], order: Order, start: int, stop: int, micro: int, **keys: Any
) -> np.ndarray:
    reader = stream.Reader(datasets, order, **keys)
    found = list(
        stream.train_batches(reader, start=start, stop=stop, micro_batch_size=micro, say=print)
    )
    assert {batch.shape for batch in found} == {(micro, SEQ_LEN + 1)}
    return np.concatenate(found)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("count", [1, 2])
def test_the_stream_is_the_order_over_windows_and_epochs(
    datasets: tuple[Manifest, ...], count: int
) -> None:
    chosen = datasets[:count]
    order = order_over(chosen)
    windows = list(order.windows(0, 70))
    assert len(windows) > 2 and 2 * order.total_tokens < 70 * PER_BATCH * SEQ_LEN
    whole = expected(chosen, order, 0, 70)
    assert np.array_equal(streamed(chosen, order, 0, 70, PER_BATCH), whole)
    # The same from any later start, for any micro batch and number of workers.
    for start, stop, micro, world in ((3, 4, 1, 1), (20, 47, 3, 2), (33, 40, 2, 3)):
        ranks = [
            streamed(chosen, order, start, stop, micro, rank=rank, world_size=world)
            for rank in range(world)
        ]
        shares = [rows.reshape(stop - start, -1, SEQ_LEN + 1) for rows in ranks]
        together = np.concatenate(shares, axis=1).reshape(-1, SEQ_LEN + 1)
        assert np.array_equal(together, whole[start * PER_BATCH : stop * PER_BATCH])


@pytest.mark.usefixtures("ray_session")
def test_a_stream_of_several_of_ray_datas_datasets_is_one(
    datasets: tuple[Manifest, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_over(datasets[:1])
    monkeypatch.setattr(stream, "DATASET_WINDOWS", 2)
    assert len(list(order.windows(0, 80))) > 4
    found = streamed(datasets[:1], order, 0, 80, 4)
    assert np.array_equal(found, expected(datasets[:1], order, 0, 80))


def test_a_stream_of_no_batches_is_empty(datasets: tuple[Manifest, ...]) -> None:
    reader = stream.Reader(datasets[:1], order_over(datasets[:1]))
    assert list(stream.train_batches(reader, start=5, stop=5, micro_batch_size=1, say=print)) == []


def test_best_fit_reads_the_same_tokens_and_cuts_fewer_documents(
    datasets: tuple[Manifest, ...],
) -> None:
    order = order_over(datasets[:1])
    plain, packed = (
        stream.Reader(datasets[:1], order, best_fit=best_fit).read(0)[0]
        for best_fit in (False, True)
    )
    assert np.array_equal(np.sort(plain[:, :-1], axis=None), np.sort(packed[:, :-1], axis=None))
    cuts = [sum(count_cuts(row, SEQ_LEN // 2, EOT) for row in rows) for rows in (plain, packed)]
    starts = [(rows[:, 0] == EOT).mean() for rows in (plain, packed)]
    assert starts[1] > 2 * starts[0], cuts  # a row that begins with a document cuts none there
    # Workers that share a lane pack it alike.
    shares = [
        stream.Reader(datasets[:1], order, rank, 3, best_fit=True)
        .read(0)[0]
        .reshape(-1, PER_BATCH // 3, SEQ_LEN + 1)
        for rank in range(3)
    ]
    assert np.array_equal(np.concatenate(shares, axis=1).reshape(packed.shape), packed)


@pytest.mark.parametrize("count", [1, 2])
def test_pairs_are_counted_over_an_epoch_whatever_the_rank(
    datasets: tuple[Manifest, ...], count: int
) -> None:
    chosen = datasets[:count]
    order = order_over(chosen)
    epoch = sum(line.total_tokens for line in order.lines)
    rows = expected(chosen, order, 0, 2 * epoch // (PER_BATCH * SEQ_LEN)).astype(np.int64)
    codes = (rows[:, :-1] * 1000 + rows[:, 1:]).ravel()[:epoch]
    counts = stream.Reader(chosen, order, rank=1, world_size=3).count_pairs(1000)
    assert np.array_equal(counts.ravel(), np.bincount(codes, minlength=1000**2))


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    """A dataset with one wrong byte, in a row group near the end of its largest shard."""
    manifest = make_dataset(tmp_path, 1)
    file = tmp_path / "train-00001.parquet"
    data = bytearray(file.read_bytes())
    offset = pq.read_metadata(file).row_group(50).column(0).data_page_offset
    data[offset + 40] ^= 1
    file.write_bytes(data)
    return manifest


@pytest.mark.usefixtures("ray_session")
def test_damage_is_named_in_one_line_through_the_stream(damaged: Manifest) -> None:
    order = order_over((damaged,))
    reader = stream.Reader((damaged,), order)
    words = r"train-00001\.parquet: row group 50 is damaged"
    with pytest.raises(DataError, match=words) as caught:  # in this process: the first window
        list(stream.train_batches(reader, start=0, stop=16, micro_batch_size=12, say=print))
    assert "\n" not in str(caught.value)
    (blocks,) = [stream._through_ray(reader, [0])]
    with pytest.raises(DataError, match=words) as caught:  # in a task of Ray Data's
        list(blocks)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("ray_session")
def test_damage_is_skipped_if_asked_and_everything_else_is_the_same(
    damaged: Manifest, datasets: tuple[Manifest, ...]
) -> None:
    order = order_over((damaged,))
    reader = stream.Reader((damaged,), order, skip_corrupt=True)
    said: list[str] = []
    batches = list(
        stream.train_batches(reader, start=0, stop=40, micro_batch_size=12, say=said.append)
    )
    found, whole = np.concatenate(batches), expected(datasets[:1], order, 0, 40)
    is_lost = found == stream.IGNORED
    assert np.array_equal(found[~is_lost], whole[~is_lost])
    per_epoch = is_lost[:, :-1].sum() / (40 * PER_BATCH * SEQ_LEN / order.total_tokens)
    assert GROUP * 0.5 < per_epoch < GROUP * 1.5
    assert said and all("row group 50 is damaged" in line for line in said)
    assert 0.9 * order.total_tokens < reader.count_pairs(1000).sum() <= order.total_tokens
    # The same through Ray, with the note.
    (block,) = stream._through_ray(reader, [0])
    assert np.array_equal(block["tokens"], reader.read(0)[0])
    assert "row group 50" in block["note"][0]


# --- the val split -------------------------------------------------------------------------------


VAL_SIZES = (301, 1, 33, 465)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A dataset of several val shards, whose tokens are their own places in the split."""
    folder = tmp_path_factory.mktemp("numbered")
    train = np.arange(100, dtype=np.uint16)
    val = np.split(np.arange(sum(VAL_SIZES), dtype=np.uint16), np.cumsum(VAL_SIZES)[:-1])
    return write_dataset(folder / "data", [train], val, GROUP)


def val_rows(manifest: Manifest, tokens: int, seq_len: int, micro: int, world: int) -> np.ndarray:
    """The rows of all workers, round by round."""
    ranks = [
        stream.val_batches(
            manifest,
            tokens=tokens,
            seq_len=seq_len,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.shape for batches in ranks for batch in batches} == {(micro, seq_len + 1)}
    return np.stack([np.stack(batches) for batches in ranks], axis=1).reshape(-1, seq_len + 1)


@few
@given(st.integers(1, 900), st.integers(1, 100), st.integers(1, 5), st.integers(1, 4))
@example(799, 100, 1, 1)  # all but the last, shorter sequence
@example(800, 100, 3, 2)  # the whole split
def test_val_is_measured_on_sequences_spread_evenly_over_the_whole_split(
    numbered: Manifest, tokens: int, seq_len: int, micro: int, world: int
) -> None:
    rows = val_rows(numbered, tokens, seq_len, micro, world)
    total = sum(VAL_SIZES)
    there = -(-(total - 1) // seq_len)
    wanted = min(there, -(-tokens // seq_len))
    chosen, padding = rows[:wanted], rows[wanted:]
    assert (padding == stream.IGNORED).all()
    assert len(padding) < micro * world  # no round of nothing
    # Whole sequences of the split, but for the split's end; their tokens are their places.
    starts = chosen[:, 0]
    places = starts[:, None] + np.arange(seq_len + 1)
    assert np.array_equal(chosen, np.where(places < total, places, stream.IGNORED))
    assert (starts % seq_len == 0).all()
    # At equal distances, to within a sequence; the first and the last are half of one from an end.
    numbers, distance = starts // seq_len, there / wanted
    assert (np.abs(np.diff(numbers) - distance) < 1).all()
    assert abs(numbers[0] - (distance / 2 - 0.5)) <= 0.5
    assert abs(there - 1 - numbers[-1] - (distance / 2 - 0.5)) <= 0.5
    count = (chosen[:, 1:] != stream.IGNORED).sum()
    assert count == stream.val_targets(total, tokens, seq_len)
    assert min(tokens, total - 1) - seq_len < count < tokens + seq_len


@few
@given(st.integers(1, 900), st.integers(1, 100), st.integers(1, 5), st.integers(1, 4))
def test_any_workers_and_micro_batches_measure_the_same_val_sequences(
    numbered: Manifest, tokens: int, seq_len: int, micro: int, world: int
) -> None:
    found, alone = (
        val_rows(numbered, tokens, seq_len, *shape) for shape in ((micro, world), (1, 1))
    )
    assert np.array_equal(found[: len(alone)], alone)


@few
@given(st.integers(1, 100), st.integers(1, 5), st.integers(1, 4))
def test_a_sample_as_large_as_the_val_split_is_the_whole_split_once(
    numbered: Manifest, seq_len: int, micro: int, world: int
) -> None:
    total = sum(VAL_SIZES)
    rows = val_rows(numbered, 65_536, seq_len, micro, world)
    targets = rows[:, 1:][rows[:, 1:] != stream.IGNORED]
    assert np.array_equal(targets, np.arange(1, total))


# --- drawing ahead -------------------------------------------------------------------------------


def counting(count: int, drawn: list[int]) -> Iterator[int]:
    for i in range(count):
        drawn.append(i)
        yield i


@few
@given(st.integers(0, 20), st.integers(1, 5))
def test_ahead_gives_the_same_items(count: int, depth: int) -> None:
    found = stream.Ahead(counting(count, []), depth)
    assert list(found) == list(range(count))
    assert list(found) == []


def test_ahead_starts_at_once_and_draws_no_more_than_its_depth() -> None:
    drawn: list[int] = []
    is_fourth = threading.Event()

    def items() -> Iterator[int]:
        for item in counting(100, drawn):
            if len(drawn) == 4:
                is_fourth.set()
            yield item

    found = stream.Ahead(items(), depth=3)
    assert is_fourth.wait(10)  # three wait in the queue, and one to get in; none was asked for
    assert drawn == [0, 1, 2, 3]
    assert next(found) == 0


def test_ahead_raises_the_error_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield from counting(2, [])
        raise DataError("a shard is missing")

    found = stream.Ahead(failing(), depth=4)
    assert [next(found) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="a shard is missing"):
        next(found)


def test_what_nobody_wants_any_more_is_let_go() -> None:
    is_closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from counting(100, [])
        finally:
            is_closed.set()

    found = stream.Ahead(items(), depth=1)
    assert next(found) == 0
    del found
    assert is_closed.wait(10)
