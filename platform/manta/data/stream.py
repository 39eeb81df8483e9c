"""The order, as a Ray Data stream: one per worker, prefetched, from any batch on.

Read instructions (one per window) flow through Ray Data with their order preserved. There is no
split coordinator and no epoch boundary; the position in the stream is the global batch index.
"""

import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.data

from manta import cluster, storage
from manta.data.manifest import Manifest, Shard
from manta.data.order import Order, Segment
from manta.errors import DataError

# Reading is mostly waiting and decompression: two tasks of no reserved CPU keep far ahead of
# training, and cannot be starved by workers that have reserved every CPU there is.
READ_TASKS = 2


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the sequences of a split; a task's worth of Ray Data's map."""

    path: str
    shards: tuple[Shard, ...]
    order: Order
    rank: int = 0
    world_size: int = 1

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """{"window": (1,), "first_batch": (1,)} -> {"tokens": (N, seq_len + 1)}."""
        (window,), (first_batch,) = batch["window"], batch["first_batch"]
        return {"tokens": self.window(int(window), int(first_batch))}

    def window(self, window: int, first_batch: int) -> np.ndarray:
        line = read_segments(self.path, self.shards, self.order.segments(window))
        length = self.order.seq_len
        rows = np.lib.stride_tricks.sliding_window_view(line, length + 1)[::length]
        return rows[self.order.sequences(window, first_batch, self.rank, self.world_size)]


def train_order(manifest: Manifest, seed: int, seq_len: int, sequences_per_batch: int) -> Order:
    """The order of a dataset's train split."""
    groups = tuple(n for shard in manifest.split("train") for n in shard.row_groups)
    return Order(groups, seed, seq_len, sequences_per_batch)


def train_batches(
    manifest: Manifest,
    order: Order,
    *,
    start: int,
    stop: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[np.ndarray]:
    """This worker's micro batches of global batches [start, stop), as (B, T + 1) arrays.

    Raises:
        DataError: a shard cannot be read (raised from Ray Data's task, as its cause).
    """
    if start >= stop:
        return
    first, first_batch = order.window_of(start)
    last, _ = order.window_of(stop - 1)
    instructions = [
        {"window": window, "first_batch": first_batch if window == first else 0}
        for window in range(first, last + 1)
    ]
    reader = Reader(manifest.path, tuple(manifest.split("train")), order, rank, world_size)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else a DataError arrives as text alone
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items(instructions, override_num_blocks=len(instructions)).map_batches(
        reader, batch_size=None, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READ_TASKS)
    )
    rows = dataset.iter_batches(
        batch_size=micro_batch_size, batch_format="numpy", prefetch_batches=4
    )
    share = order.sequences_per_batch // world_size
    batches = zip(range((stop - start) * share // micro_batch_size), rows, strict=False)
    try:
        for _, batch in batches:
            yield batch["tokens"]
    except DataError as e:  # Ray appends its own advice, and the traceback
        raise DataError(str(cluster.cause_of(e)).splitlines()[0]) from None


def ahead(batches: Iterator[np.ndarray], depth: int = 4) -> Iterator[np.ndarray]:
    """The same batches, drawn in a thread that starts now: a stream's first batch takes seconds,
    in which the worker can build its model. At most `depth` wait at a time."""
    waiting: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(depth)

    def draw() -> None:
        try:
            for batch in batches:
                waiting.put(batch)
            waiting.put(None)
        except BaseException as e:
            waiting.put(e)

    threading.Thread(target=draw, daemon=True).start()

    def drawn() -> Iterator[np.ndarray]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    return drawn()


def val_batches(
    manifest: Manifest,
    *,
    tokens: int,
    seq_len: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """This worker's share of the first `tokens` tokens of the val split, in memory.

    Every worker gets the same number of (B, T + 1) arrays, whole ones; what is missing at the end
    is -1, which no loss counts. Over all workers, each target stands in them exactly once.
    """
    shards = tuple(manifest.split("val"))
    groups = [n for shard in shards for n in shard.row_groups]
    wanted: list[Segment] = []
    left = tokens + 1
    for index, size in enumerate(groups):
        if left <= 0:
            break
        wanted.append(Segment(index, 0, min(size, left)))
        left -= size
    line = read_segments(manifest.path, shards, wanted).astype(np.int64)
    count = -(-(len(line) - 1) // seq_len)
    per_round = micro_batch_size * world_size
    padded = np.full(-(-count // per_round) * per_round * seq_len + 1, -1, dtype=np.int64)
    padded[: len(line)] = line
    rows = np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]
    rounds = rows.reshape(-1, world_size, micro_batch_size, seq_len + 1)
    return [np.ascontiguousarray(batch) for batch in rounds[:, rank]]


def read_segments(path: str, shards: tuple[Shard, ...], segments: list[Segment]) -> np.ndarray:
    """The tokens of some segments, end to end.

    Raises:
        DataError: naming the shard that is missing, cut short or not as its manifest says.
    """
    places = [(shard, i) for shard in shards for i in range(len(shard.row_groups))]
    pieces = []
    for segment in segments:
        shard, index = places[segment.row_group]
        file = storage.join(path, shard.file)
        try:
            column = _open(file, shard.sha256).read_row_group(index, columns=["tokens"])["tokens"]
            tokens = column.combine_chunks().flatten().to_numpy()
        except (OSError, ValueError) as e:  # pyarrow's errors are kinds of these
            raise DataError(
                f"{file}: row group {index} cannot be read ({e}); restore the file, or delete "
                f"{path} to prepare the data anew"
            ) from None
        if len(tokens) != shard.row_groups[index]:
            raise DataError(
                f"{file}: row group {index} has {len(tokens)} tokens, its manifest says "
                f"{shard.row_groups[index]}; restore the file, or prepare the data anew"
            )
        pieces.append(tokens[segment.start : segment.stop])
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=64)
def _open(file: str, _sha256: str) -> pq.ParquetFile:
    """An open shard; its footer is read once (by content, so a shard made anew is opened anew)."""
    fs, inside = storage.filesystem(file)
    return pq.ParquetFile(fs.open_input_file(inside))
