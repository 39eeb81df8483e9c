"""The order as a Ray Data stream: one per worker, prefetched, starting at any batch.

Read instructions (one per window) flow through Ray Data with their order preserved. There is no
split coordinator and no epoch boundary; the position in the stream is the global batch index.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray.data

from manta import failures
from manta.data import shards
from manta.data.ahead import Ahead
from manta.data.manifest import Manifest, Shard
from manta.data.order import Order, Segment, Take
from manta.data.packing import pack
from manta.errors import DataError
from manta.model.targets import IGNORED

# One task, which reserves no CPU. It stays far ahead of training, and workers that have reserved
# every CPU cannot starve it. A second task would be little faster, and need as much memory again.
READ_TASKS = 1
PAIRS_COUNTED = 1 << 24  # one window, which is read at once anyway
READS_AT_ONCE = 4  # because an object store is slow to answer a read
# Ray Data plans all tasks of a dataset at its start, so an endless stream is several datasets.
DATASET_WINDOWS = 512
# Lanes, neighbours on the line, that are read together. If all lanes of a window were one read, it
# would need memory for a second copy of the window.
LANES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads what a worker trains on, one window per call; Ray Data maps this function.

    manifests: one for each of the order's lines, of the line's dataset.
    best_fit: pack documents into rows so that few are cut; if false, one after the other.
    skip_corrupt: put IGNORED in place of damaged tokens, with a note; if false, raise DataError.
    """

    manifests: tuple[Manifest, ...]
    order: Order
    rank: int = 0
    world_size: int = 1
    best_fit: bool = False
    skip_corrupt: bool = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Reads a window: {"first_batch": (1,)} -> {"tokens": (N, seq_len + 1), "note": (N,)}.

        The first row of "note" has all notes on tokens that could not be read.
        """
        (first_batch,) = batch["first_batch"]
        tokens, notes = self.read(int(first_batch))
        return {"tokens": tokens, "note": np.array(["\n".join(notes), *[""] * (len(tokens) - 1)])}

    def read(self, first_batch: int) -> tuple[np.ndarray, list[str]]:
        """Reads this worker's rows of the batches from `first_batch` to the end of its window.

        Returns the rows, (N, seq_len + 1), batch by batch, and notes on tokens that could not be
        read.
        """
        window = self.order.window_at(first_batch)
        share = window.sequences_per_batch // self.world_size
        length = self.order.seq_len
        dtype = np.dtype(np.int32 if self.skip_corrupt else self.manifests[0].dtype)
        out = np.empty(((window.stop_batch - first_batch) * share, length + 1), dtype=dtype)
        notes: list[str] = []
        takes = self.order.takes(window, self.rank, self.world_size, first_batch)
        for line, group in itertools.groupby(takes, key=lambda take: take.line):
            while lanes := list(itertools.islice(group, LANES_AT_ONCE)):
                first = lanes[0].first
                stop = lanes[-1].first + len(lanes[-1].rows)
                tokens = self._line_tokens(line, first * length, stop * length + 1, dtype, notes)
                for take in lanes:
                    start = (take.first - first) * length
                    piece = tokens[start : start + len(take.rows) * length + 1]
                    self._place(piece, take, out)
        return out, notes

    def count_pairs(self, vocab_size: int) -> np.ndarray:
        """Counts how often each token follows each token: (V, V) float32, the same on all ranks.

        The count covers one epoch, or its first PAIRS_COUNTED tokens if it has more.
        """
        wanted = min(PAIRS_COUNTED, sum(line.total_tokens for line in self.order.lines))
        everyone = dataclasses.replace(self, rank=0, world_size=1)
        codes: list[np.ndarray] = []
        batch = count = 0
        while count < wanted:
            rows = everyone.read(batch)[0].astype(np.int64)
            before, after = rows[:, :-1], rows[:, 1:]
            is_read = (before != IGNORED) & (after != IGNORED)
            codes.append((before * vocab_size + after)[is_read])
            count += before.size
            batch = self.order.window_at(batch).stop_batch
        counts = np.bincount(np.concatenate(codes)[:wanted], minlength=vocab_size**2)
        return counts.astype(np.float32).reshape(vocab_size, vocab_size)

    def _place(self, piece: np.ndarray, take: Take, out: np.ndarray) -> None:
        length = self.order.seq_len
        if self.best_fit:
            piece = pack(piece, length, self.manifests[take.line].eot)
        rows = np.lib.stride_tricks.sliding_window_view(piece, length + 1)[::length]
        is_ours = take.rows >= 0
        out[take.rows[is_ours]] = rows if is_ours.all() else rows[is_ours]

    def _line_tokens(
        self, line: int, start: int, stop: int, dtype: np.dtype, notes: list[str]
    ) -> np.ndarray:
        tokens = np.empty(stop - start, dtype=dtype)
        segments = self.order.lines[line].segments(start, stop)
        at = 0
        read = functools.partial(self._read, self.manifests[line])
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            for piece, found in pool.map(read, segments):
                tokens[at : at + len(piece)] = piece
                at += len(piece)
                notes += found
        return tokens

    def _read(self, manifest: Manifest, segment: Segment) -> tuple[np.ndarray, list[str]]:
        """The segment's tokens, and notes on those that could not be read."""
        try:
            return self._open(manifest, segment.shard).read(segment.start, segment.stop), []
        except DataError:
            if not self.skip_corrupt:
                raise
        return self._salvage(manifest, segment)

    def _salvage(self, manifest: Manifest, segment: Segment) -> tuple[np.ndarray, list[str]]:
        """The segment, with IGNORED in place of each row group that cannot be read, and notes."""
        tokens = np.full(segment.stop - segment.start, IGNORED, dtype=np.int32)
        notes = []
        size = manifest.row_group_tokens
        for begin in range(segment.start // size * size, segment.stop, size):
            start, stop = max(begin, segment.start), min(begin + size, segment.stop)
            place = slice(start - segment.start, stop - segment.start)
            try:
                tokens[place] = self._open(manifest, segment.shard).read(start, stop)
            except DataError as e:
                notes.append(f"skipping {stop - start:,} tokens: {e}")
        return tokens, notes

    def _open(self, manifest: Manifest, number: int) -> shards.ShardReader:
        shard = self._shards[manifest.path][number]
        return shards.open_shard(manifest.path, shard, manifest.dtype, manifest.row_group_tokens)

    @functools.cached_property
    def _shards(self) -> dict[str, list[Shard]]:
        return {manifest.path: manifest.split("train") for manifest in self.manifests}


def train_batches(
    reader: Reader,
    *,
    start: int,
    stop: int,
    micro_batch_size: int,
    say: Callable[[str], None],
) -> Iterator[np.ndarray]:
    """The worker's micro batches of global batches [start, stop), as (B, T + 1) arrays.

    Reading begins at once, not when the first micro batch is requested.

    Args:
        reader: reads for one worker, given by its rank.
        say: is called with a line for each row group that is skipped.

    Raises:
        DataError: a shard cannot be read (raised when its batches would come).
    """
    order = reader.order
    count = (order.sequences_before(stop) - order.sequences_before(start)) // reader.world_size
    return _cut(Ahead(_windows(reader, start, stop, say), depth=1), count, micro_batch_size)


def _cut(windows: "Ahead[np.ndarray]", count: int, micro_batch_size: int) -> Iterator[np.ndarray]:
    """Yields the first `count` rows, `micro_batch_size` at a time, without copying them."""
    for rows in windows:
        for first in range(0, min(len(rows), count), micro_batch_size):
            yield rows[first : first + micro_batch_size]
        count -= len(rows)


def _windows(
    reader: Reader, start: int, stop: int, say: Callable[[str], None]
) -> Iterator[np.ndarray]:
    """Yields what the worker reads of each window, one after the other.

    The first window of each Ray Data dataset is read here, while the tasks of the dataset start.
    That takes seconds, in which nothing would come.
    """
    windows = reader.order.windows(start, stop)
    batches = (max(start, window.first_batch) for window in windows)
    while chunk := list(itertools.islice(batches, DATASET_WINDOWS)):
        rest = Ahead(_through_ray(reader, chunk[1:]), depth=1)
        try:
            here = (reader({"first_batch": [batch]}) for batch in chunk[:1])
            for block in itertools.chain(here, rest):
                for note in block["note"][0].splitlines():
                    say(note)
                yield block["tokens"]
        finally:
            rest.close()


def _through_ray(reader: Reader, first_batches: list[int]) -> Iterator[dict[str, np.ndarray]]:
    if not first_batches:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # otherwise a DataError arrives as mere text
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    instructions = [{"first_batch": batch} for batch in first_batches]
    dataset = ray.data.from_items(instructions, override_num_blocks=len(instructions)).map_batches(
        reader,
        batch_size=None,
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=READ_TASKS),
    )
    try:
        # Ask for whole blocks: `train_batches` cuts them up, without copying.
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
    except DataError as e:  # Ray appends its own advice and the traceback
        raise DataError(str(failures.cause_of(e)).splitlines()[0]) from None


def val_sequences(total: int, tokens: int, seq_len: int) -> np.ndarray:
    """The sequences of a val split that are measured: as many as hold `tokens` targets, spread over
    the whole split at equal distances; all if it has fewer.

    The split, `total` tokens, is cut into sequences of `seq_len` targets. Only the last one may be
    shorter. The choice depends on nothing else, so all workers and micro batches have the same.
    """
    there = -(-(total - 1) // seq_len)
    count = min(there, -(-tokens // seq_len))
    return (2 * np.arange(count) + 1) * there // (2 * count)  # the middle of each of `count` parts


def val_targets(total: int, tokens: int, seq_len: int) -> int:
    """The number of targets that `val_sequences` chooses for these arguments."""
    ends = (val_sequences(total, tokens, seq_len) + 1) * seq_len
    return len(ends) * seq_len - max(0, int(ends[-1]) - (total - 1))


def val_batches(
    manifest: Manifest,
    *,
    tokens: int,
    seq_len: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """This worker's share of the sample of the val split (`val_sequences`), in memory.

    Every worker gets the same number of whole (B, T + 1) arrays, padded at the end with IGNORED.
    Over all workers, each target of the sample is in them exactly once.
    """
    total = sum(shard.tokens for shard in manifest.split("val"))
    chosen = val_sequences(total, tokens, seq_len)
    per_round = micro_batch_size * world_size
    # A row that starts behind the split is padding.
    starts = np.full(-(-len(chosen) // per_round) * per_round, total, dtype=np.int64)
    starts[: len(chosen)] = chosen * seq_len
    places = starts.reshape(-1, world_size, micro_batch_size, 1)[:, rank] + np.arange(seq_len + 1)
    rows = np.full(places.shape, IGNORED, dtype=np.int64)
    is_there = places < total
    rows[is_there] = shards.tokens_at(manifest, "val", places[is_there])
    return list(rows)
