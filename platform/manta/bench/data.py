"""Measures the data stream: its speed against a bare pyarrow read of the same shards, its time to
the first batch, how long a fast consumer waits for it, and the memory that it takes."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from manta import ownership, storage
from manta.bench.memory import COUNTED, SHARED_ACTORS, MemoryWatch, total_memory
from manta.bench.settings import BenchConfig
from manta.data import stream
from manta.data.manifest import Manifest, Shard
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Phase, make_stages
from manta.data.prepare import ROW_GROUP_TOKENS
from manta.data.shards import ShardWriter

SHARD_TOKENS = 1 << 25
VOCAB_SIZE = 50_257
BATCH_TOKENS = 1 << 19  # GPT-2's
SEQ_LEN = 1024
MICRO_BATCH = 16
FAST_CONSUMER = 1.5e6  # tokens/s: about what eight fast GPUs read at 124M parameters
FAST_SECONDS = 30.0
PAUSE_SECONDS = 3.0
LARGE_TOKENS = 10_000_000_000


def data(c: BenchConfig) -> dict[str, Any]:
    with ownership.scratch(c.home_folder, "bench-data") as path:
        return measure(made_of_noise(path, c.tokens), c)


def made_of_noise(path: str, tokens: int) -> Manifest:
    """Writes a dataset of random ids, as frequent as words (Zipf), which compress as text does."""
    draw = np.random.default_rng(0)
    shards = []
    for index in range(-(-tokens // SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - index * SHARD_TOKENS)
        ids = (draw.zipf(1.1, count) % VOCAB_SIZE).astype(np.uint16)
        file = f"train-{index:05d}.parquet"
        writer = ShardWriter(storage.join(path, file), ids.dtype, ROW_GROUP_TOKENS)
        writer.write(ids)
        shards.append(Shard(file, "train", 1, count, count, VOCAB_SIZE - 1, *writer.close()))
    return Manifest(
        path, {}, "none", "", VOCAB_SIZE, 0, "uint16", ROW_GROUP_TOKENS, {}, {}, tuple(shards)
    )


def measure(manifest: Manifest, c: BenchConfig) -> dict[str, Any]:
    before = total_memory(SHARED_ACTORS)
    with MemoryWatch(SHARED_ACTORS) as memory:
        stream_read(manifest, c.tokens)
    bare, streamed, ratios, firsts = [], [], [], []
    for _ in range(c.rounds):
        bare.append(bare_read(manifest))
        rate, first = stream_read(manifest, c.tokens)
        streamed.append(rate)
        ratios.append(rate / bare[-1])
        firsts.append(first)
    large = dataclasses.replace(manifest, shards=manifest.shards * (-(-LARGE_TOKENS // c.tokens)))
    seeks: dict[str, list[float]] = {"start": [], "middle": []}
    for _ in range(3):
        for place, batch in (("start", 0), ("middle", LARGE_TOKENS // BATCH_TOKENS // 2)):
            seeks[place].append(first_batch_seconds(large, batch))
            time.sleep(PAUSE_SECONDS)  # until the abandoned stream's reads end
    wait = fast_consumer_wait(manifest, c.tokens)
    return {
        "pyarrow_tokens_per_second": statistics.median(bare),
        "stream_tokens_per_second": statistics.median(streamed),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "first_batch_seconds": statistics.median(firsts),
        "seek_start_seconds": statistics.median(seeks["start"]),
        "seek_middle_seconds": statistics.median(seeks["middle"]),
        "fast_consumer_wait_share": wait,
        "memory_bytes": memory.peak - before,
        "memory_half_bytes": [peak - before for peak in memory.halves()],
        "tokens_streamed": c.tokens,
    }


def bare_read(manifest: Manifest) -> float:
    """Tokens/s of pyarrow alone when it reads every shard from start to end."""
    started = time.perf_counter()
    total = 0
    for shard in manifest.shards:
        fs, inside = storage.filesystem(storage.join(manifest.path, shard.file))
        total += pq.read_table(inside, filesystem=fs).num_rows
    return total / (time.perf_counter() - started)


def stream_read(manifest: Manifest, tokens: int) -> tuple[float, float]:
    """(tokens/s once running, seconds to the first batch) of the stream over one epoch."""
    started = time.perf_counter()
    batches = _batches(manifest, 0, tokens // BATCH_TOKENS)
    next(batches)
    first = time.perf_counter()
    rows = sum(len(batch) for batch in batches)
    return rows * SEQ_LEN / (time.perf_counter() - first), first - started


def first_batch_seconds(manifest: Manifest, batch: int) -> float:
    started = time.perf_counter()
    batches = _batches(manifest, batch, batch + 200)
    next(batches)
    return time.perf_counter() - started


def fast_consumer_wait(manifest: Manifest, tokens: int) -> float:
    """The share of its time that a consumer of FAST_CONSUMER tokens/s waits for batches, not
    counting the wait for the first one."""
    count = int(min(tokens * 2, FAST_CONSUMER * FAST_SECONDS)) // BATCH_TOKENS
    batches = _batches(manifest, 0, count)
    next(batches)
    waited = 0.0
    started = time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        got = time.perf_counter()
        if batch is None:
            break
        waited += got - asked
        time.sleep(max(0.0, len(batch) * SEQ_LEN / FAST_CONSUMER - (time.perf_counter() - got)))
    return waited / (time.perf_counter() - started)


def _batches(manifest: Manifest, start: int, stop: int) -> Iterator[np.ndarray]:
    stages = make_stages({}, SEQ_LEN, BATCH_TOKENS)
    order = make_order((manifest,), (Phase(0, (PERIOD,)),), stages, 0, SEQ_LEN)
    reader = stream.Reader((manifest,), order)
    return stream.train_batches(
        reader, start=start, stop=stop, micro_batch_size=MICRO_BATCH, say=print
    )


def table(result: dict[str, Any]) -> str:
    ratios, halves = result["ratios"], result["memory_half_bytes"]
    return "\n".join(
        [
            f"bare pyarrow read        {result['pyarrow_tokens_per_second'] / 1e6:>8.1f} M tok/s",
            f"stream, once running     {result['stream_tokens_per_second'] / 1e6:>8.1f} M tok/s",
            f"stream / pyarrow         {result['ratio']:>8.1%}  (median of {len(ratios)} rounds, "
            f"{min(ratios):.1%} to {max(ratios):.1%})",
            f"first batch              {result['first_batch_seconds']:>8.2f} s",
            f"of 10 billion tokens     {result['seek_start_seconds']:>8.2f} s to the first batch, "
            f"{result['seek_middle_seconds']:.2f} s to the middle one",
            f"wait at 1.5 M tok/s      {result['fast_consumer_wait_share']:>8.2%} of the time",
            f"memory of the stream     {result['memory_bytes'] / 1e6:>8.0f} MB over "
            f"{result['tokens_streamed'] / 1e6:,.0f} M tokens (first half "
            f"{halves[0] / 1e6:.0f}, second {halves[1] / 1e6:.0f}), {COUNTED}",
        ]
    )
