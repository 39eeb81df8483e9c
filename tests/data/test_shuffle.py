"""The two passes of the shuffle, by property, for any hashes; and how much memory they use."""

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.preparing import VAL_FRACTION, config_of, set_sizes
from manta.data import prepare, shuffle
from manta.data.shuffle import SPLITS, Gather, Key, Scatter
from manta.text import sources, tokenizer

few = settings(deadline=None, max_examples=50)

# --- the two splits ------------------------------------------------------------------------------


@few
@given(st.lists(st.text(), min_size=1), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_document_in_a_small_val_split_is_in_each_larger_one(
    texts: list[str], a: float, b: float
) -> None:
    small, large = sorted((a, b))
    digests = [Key.digest(text.encode()) for text in texts]
    for seed in (0, 7):  # the seed does not matter
        key = Key.of(digests, seed)
        assert (key.is_val(large) | ~key.is_val(small)).all()
        assert np.array_equal(key.is_val(small), Key.of(digests, 3).is_val(small))
        assert not key.is_val(0.0).any()
        assert key.is_val(1.0).all()


# --- both passes, by property --------------------------------------------------------------------

# Hashes at and around the ends of ranges, for up to seven shards.
BORDERS = sorted(
    {
        min(max((i << 64) // count + step, 0), 2**64 - 1)
        for count in range(1, 8)
        for i in range(count + 1)
        for step in (-1, 0, 1)
    }
)
Document = tuple[int, int]  # (order, rest)


def tokens_for(document: Document) -> np.ndarray:
    order, rest = document
    draw = np.random.default_rng([order, rest])
    return np.append(draw.integers(1, 200, 1 + (order + rest) % 9), 0).astype(np.uint16)


class FakeHeld:
    """The documents of a run whose texts have these hashes, for which no real texts could be
    found."""

    def __init__(self, documents: list[Document], start: int, split: str):
        word = {"train": 2**64 - 1, "val": 0}[split]
        self.documents = [tokens_for(document) for document in documents]
        self.digests = [struct.pack("<QQQ", word, order ^ start, rest) for order, rest in documents]
        self.sizes = [len(tokens) - 1 for tokens in self.documents]


runs_of_documents = st.lists(
    st.lists(
        st.tuples(st.sampled_from(BORDERS) | st.integers(0, 2**64 - 1), st.integers(0, 2)),
        min_size=1,
        max_size=30,
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("examples", [60, pytest.param(300, marks=pytest.mark.long)])
def test_the_shards_are_the_distinct_documents_in_order_whatever_the_hashes(examples: int) -> None:
    drawn = given(
        runs=runs_of_documents,
        split=st.sampled_from(SPLITS),
        count=st.integers(1, 7),
        batch_tokens=st.integers(1, 60),
        seed=st.integers(0, 3),
    )
    settings(deadline=None, max_examples=examples)(drawn(check_the_shards))()


@example([[(2**63, 0)] * 5 + [(2**63 - 1, 1)] * 5, [(2**63, 1)]], "train", 2, 5, 0)
@example([[(0, 0), (2**64 - 1, 0)]], "val", 7, 50, 0)  # shards in the middle get nothing
def check_the_shards(
    runs: list[list[Document]], split: str, count: int, batch_tokens: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "mix_bits", lambda words: words)
        start = int(Key.of([bytes(24)], seed).order[0])  # undone, so that hashes are as given
        patch.setattr(shuffle, "BATCH_TOKENS", batch_tokens)
        scatter = Scatter(folder, [], b"", seed, 0.5)
        written = []
        for number, documents in enumerate(runs):
            held: Any = FakeHeld(documents, start, split)
            written += scatter._write(held, 0, f"run-{number}")
        counts = (count, 2) if split == "train" else (2, count)
        gather = Gather(folder, written, counts, "uint16", 16)
        records = [gather.run(i) for i in range(sum(counts))]
        places = [gather.place(i) for i in range(sum(counts))]
        whole = {document for documents in runs for document in documents}
        for record, (of, number, of_count) in zip(records, places, strict=True):
            low, high = ((i << 64) // of_count for i in (number, number + 1))
            expected = sorted(d for d in whole if low <= d[0] < high) if of == split else []
            shard = record["shard"]
            name = shuffle.shard_name(of, number)
            assert json.loads((Path(folder) / "work" / f"{name}.json").read_text()) == record
            assert (Path(folder) / f"{name}.parquet").exists() == bool(expected)
            if not expected:
                assert (shard, record["duplicates"]) == (None, 0)
                continue
            tokens = np.concatenate([tokens_for(document) for document in expected])
            found = pq.read_table(f"{folder}/{name}.parquet")["tokens"].to_numpy()
            assert np.array_equal(found, tokens)
            assert (shard["documents"], shard["tokens"]) == (len(expected), len(tokens))
            assert shard["text_bytes"] == len(tokens) - len(expected)
            here = sum(low <= order < high for documents in runs for order, _ in documents)
            assert record["duplicates"] == here - len(expected)
        assert sum(record["duplicates"] for record in records) == sum(map(len, runs)) - len(whole)


def test_memory_holds_one_run(source: Path, rows: list[str], here: pytest.MonkeyPatch) -> None:
    """A run ends with the document that fills it, and a batch with the one that fills it."""
    set_sizes(here, part_bytes=20_000, run_bytes=2000)
    longest = max(len(row.encode()) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        parts = sources.parts(config_of(source).corpus)
        made = tokenizer.train(["ray"], 260)
        task = Scatter(folder, parts, made.serialized, 0, VAL_FRACTION)
        assert len(parts) > 1
        for index in range(len(parts)):
            record = task.run(index)
            sizes: dict[str, int] = {}
            for run in record["runs"]:
                number = run["file"].rpartition("-")[0]
                sizes[number] = sizes.get(number, 0) + run["text_bytes"]
                with pa.ipc.open_file(f"{folder}/work/{run['file']}") as reader:
                    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                assert [batch["order"][0].as_py() for batch in batches] == run["starts"]
                tokens = [len(batch["tokens"].flatten()) for batch in batches]
                assert sum(tokens) == run["tokens"]
                # One document more than fits, at one byte per token, with its end-of-text.
                assert max(tokens) <= shuffle.BATCH_TOKENS + longest + 1
                assert sum(batch.num_rows for batch in batches) == run["documents"]
            *full, last = sizes.values()
            assert len(full) > 1
            assert all(shuffle.RUN_BYTES <= size < shuffle.RUN_BYTES + longest for size in full)
            assert 0 < last < shuffle.RUN_BYTES + longest


def test_a_shard_is_of_a_bounded_size_however_large_the_corpus() -> None:
    least, most = prepare.LEAST_SHARD_TOKENS, prepare.MOST_SHARD_TOKENS
    assert [prepare._shards_for(n) for n in (0, 1, least, least + 1)] == [0, 1, 1, 2]
    for tokens in (10**6, 10**8, 10**9, 10**10, 10**12, 10**13):
        each = tokens / prepare._shards_for(tokens)
        assert least / 2 < each <= most or tokens < least
        assert prepare._shards_for(tokens) >= min(prepare.SHARDS_WANTED, tokens // least)
