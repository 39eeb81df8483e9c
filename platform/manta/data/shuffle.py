"""Shuffles documents and drops duplicates, whatever their number, in two passes over disk.

Scatter: each part's documents are tokenized and written in runs, sorted by a hash of their text.
Gather: each shard takes the documents of one range of hashes from all runs, sorted. So documents
come in a random order that depends on their texts and the seed, and on nothing else: neither on the
files they were in, nor on which process read them when. Equal documents meet, and all but one are
dropped. Memory holds one run, or one shard.

work/part-00007-000-train.arrow   a run         work/part-00007.json    record of a part
                                                work/train-00003.json   record of a shard
A record is written after the files that it describes; work that has a record is not done again.
"""

import abc
import bisect
import dataclasses
import hashlib
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa

from manta import storage
from manta.data.decontaminate import Decontaminator
from manta.data.manifest import Shard
from manta.data.order import fold, mix_bits
from manta.data.shards import ShardWriter
from manta.errors import DataError, MantaError
from manta.text import sources, tokenizer
from manta.text.rows import BadRows
from manta.text.tokenizer import Tokenizer

WORK = "work"
SPLITS = ("train", "val")
RUN_BYTES = 64 << 20  # of text
BATCH_TOKENS = 1 << 17  # the smallest piece of a run that is read
LENGTH_BINS = 40
KEY_BYTES = 24


def record_path(path: str, name: str) -> str:
    return storage.join(path, WORK, f"{name}.json")


def part_name(index: int) -> str:
    return f"part-{index:05d}"


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


@dataclasses.dataclass(frozen=True)
class Key:
    """Hashes of the texts of N documents, (N,) uint64 each.

    `split` decides between train and val; `order`, which depends on the seed too, decides on the
    place in the shuffle; `order` and `rest` together distinguish texts.
    """

    split: np.ndarray
    order: np.ndarray
    rest: np.ndarray

    @staticmethod
    def digest(text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()

    @classmethod
    def of(cls, digests: list[bytes], seed: int) -> "Key":
        words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 3)
        return cls(words[:, 0], mix_bits(words[:, 1] ^ fold(seed)), words[:, 2])

    def is_val(self, fraction: float) -> np.ndarray:
        """Whether each document belongs to the val split, (N,) bool.

        The text alone decides. So a document stays in its split whatever is added to the corpus,
        and copies of a document never land in both splits.
        """
        return self.split < fraction * 2.0**64


class _Task(abc.ABC):
    """A task for Ray Data: takes one index and returns its record.

    Errors are returned as values, because Ray Data retries a task that raises and prints its stack.
    """

    path: str

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (index,) = batch["index"]
        try:
            found, error = self.run(int(index)), ""
        except MantaError as e:
            found, error = {}, str(e)
        except OSError as e:  # from writing: an unreadable corpus is a DataError
            found, error = {}, f"{self.path}: cannot be written ({e.strerror or e}); {RESUME}"
        return {"index": [index], "found": [json.dumps(found)], "error": [error]}

    @abc.abstractmethod
    def run(self, index: int) -> dict[str, Any]:
        """Does the work of one index and returns its record."""


RESUME = "free disk space, and run the same command again: it resumes where this one stopped"


@dataclasses.dataclass(frozen=True)
class Scatter(_Task):
    """Tokenizes part number `index` into runs."""

    path: str
    parts: list[sources.Part]
    tokenizer: bytes
    seed: int
    val: float | sources.Source
    """The val split: a share of the documents, or all documents of a source."""
    decontaminator: Decontaminator | None = None

    def run(self, index: int) -> dict[str, Any]:
        made = tokenizer.from_bytes(self.tokenizer)
        name = part_name(index)
        runs: list[dict[str, Any]] = []
        dropped = {"empty": 0, "contaminated": 0}
        held = _Held(made)
        bad = BadRows(self.parts[index].source.on_bad_rows)
        for text in sources.all_documents(self.parts[index], bad):
            if not text.strip():
                dropped["empty"] += 1
            elif self.decontaminator is not None and self.decontaminator.contaminated(text):
                dropped["contaminated"] += 1
            else:
                held.add(text)
            if held.text_bytes >= RUN_BYTES:
                runs += self._write(held, index, f"{name}-{len(runs):03d}")
                held = _Held(made)
        if held.documents:
            runs += self._write(held, index, f"{name}-{len(runs):03d}")
        record = {"runs": runs, "dropped": dropped, "skipped": bad.counts}
        storage.write_json(record_path(self.path, name), record)
        return record

    def _write(self, held: "_Held", index: int, name: str) -> list[dict[str, Any]]:
        key = Key.of(held.digests, self.seed)
        if isinstance(self.val, sources.Source):
            is_val = np.full(len(held.digests), self.parts[index].source == self.val)
        else:
            is_val = key.is_val(self.val)
        runs = []
        for split, wanted in zip(SPLITS, (~is_val, is_val), strict=True):
            chosen = np.flatnonzero(wanted)
            chosen = chosen[np.lexsort((key.rest[chosen], key.order[chosen]))]
            if not len(chosen):
                continue
            tokens = [held.documents[i] for i in chosen]
            offsets = np.cumsum([0, *map(len, tokens)])
            table = pa.table(
                {
                    "order": key.order[chosen],
                    "rest": key.rest[chosen],
                    "text_bytes": np.asarray(held.sizes, dtype=np.uint32)[chosen],
                    "tokens": pa.LargeListArray.from_arrays(offsets, np.concatenate(tokens)),
                }
            )
            starts = _cuts(offsets)
            file = f"{name}-{split}.arrow"
            sink = io.BytesIO()
            with pa.ipc.new_file(sink, table.schema) as writer:
                for a, b in zip(starts, [*starts[1:], len(chosen)], strict=True):
                    writer.write_batch(table.slice(a, b - a).combine_chunks().to_batches()[0])
            storage.write_bytes(storage.join(self.path, WORK, file), sink.getvalue())
            firsts = table["order"].take(pa.array(starts)).to_pylist()
            runs.append(
                {
                    "file": file,
                    "split": split,
                    "documents": len(chosen),
                    "tokens": int(offsets[-1]),
                    "text_bytes": int(np.asarray(held.sizes)[chosen].sum()),
                    "starts": firsts,
                }
            )
        return runs


class _Held:
    """The documents of a run, before the run is sorted."""

    def __init__(self, made: Tokenizer):
        self._tokenizer = made
        self.documents: list[np.ndarray] = []
        self.digests: list[bytes] = []
        self.sizes: list[int] = []
        self.text_bytes = 0

    def add(self, text: str) -> None:
        data = text.encode()
        self.documents.append(self._tokenizer.document(text))
        self.digests.append(Key.digest(data))
        self.sizes.append(len(data))
        self.text_bytes += len(data)


def _cuts(offsets: np.ndarray) -> list[int]:
    """The index of the first document of each batch of about BATCH_TOKENS tokens."""
    batch_of = offsets[:-1] // BATCH_TOKENS
    return [0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist()]


@dataclasses.dataclass(frozen=True)
class Gather(_Task):
    """Writes shard number `index`; `counts` is (train shards, val shards), train first."""

    path: str
    runs: list[dict[str, Any]]
    counts: tuple[int, int]
    dtype: str
    row_group_tokens: int

    def place(self, index: int) -> tuple[str, int, int]:
        """Returns (split, number of the shard in the split, number of shards in the split)."""
        train, val = self.counts
        return ("train", index, train) if index < train else ("val", index - train, val)

    def run(self, index: int) -> dict[str, Any]:
        split, number, count = self.place(index)
        name = shard_name(split, number)
        low, high = ((i << 64) // count for i in (number, number + 1))
        pieces = [
            p for run in self.runs if run["split"] == split for p in self._read(run, low, high)
        ]
        record: dict[str, Any] = {"shard": None, "duplicates": 0, "lengths": []}
        if pieces:
            record = self._write(pa.concat_tables(pieces), split, name)
        storage.write_json(record_path(self.path, name), record)
        return record

    def _read(self, run: dict[str, Any], low: int, high: int) -> list[pa.Table]:
        """The documents of a run whose order is in [low, high)."""
        starts = run["starts"]
        first = max(0, bisect.bisect_left(starts, low) - 1)
        last = bisect.bisect_left(starts, high)
        if first >= last:
            return []
        file = storage.join(self.path, WORK, run["file"])
        fs, inside = storage.filesystem(file)
        try:
            with fs.open_input_file(inside) as f, pa.ipc.open_file(f) as reader:
                found = []
                for i in range(first, last):
                    batch = reader.get_batch(i)
                    order = batch["order"].to_numpy()
                    a = int(np.searchsorted(order, np.uint64(low), side="left"))
                    b = int(np.searchsorted(order, np.uint64(high - 1), side="right"))
                    if a < b:
                        found.append(pa.Table.from_batches([batch.slice(a, b - a)]))
                return found
        except (OSError, pa.ArrowInvalid) as e:
            raise DataError(
                f"{file}: cannot be read ({e}); delete {self.path} and run the same command again"
            ) from None

    def _write(self, table: pa.Table, split: str, name: str) -> dict[str, Any]:
        order, rest = (table[key].to_numpy() for key in ("order", "rest"))
        sorting = np.lexsort((rest, order))
        order, rest = order[sorting], rest[sorting]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (order[1:] != order[:-1]) | (rest[1:] != rest[:-1])
        kept = sorting[is_first]
        lists = table["tokens"].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
        starts, stops = offsets[kept], offsets[kept + 1]
        tokens = np.concatenate([values[a:b] for a, b in zip(starts, stops, strict=True)])
        file = f"{name}.parquet"
        writer = ShardWriter(
            storage.join(self.path, file), np.dtype(self.dtype), self.row_group_tokens
        )
        writer.write(tokens)
        size, digest, footer = writer.close()
        text_bytes = int(table["text_bytes"].to_numpy()[kept].sum(dtype=np.int64))
        shard = Shard(
            file, split, len(kept), len(tokens), text_bytes,  # type: ignore[arg-type]
            int(tokens.max()), size, digest, footer,
        )  # fmt: skip
        return {
            "shard": dataclasses.asdict(shard),
            "duplicates": len(order) - len(kept),
            "lengths": length_counts(stops - starts),
        }


def length_counts(lengths: np.ndarray) -> list[list[int]]:
    """Returns [documents, tokens] by length: bin i is for lengths 2^i to 2^(i+1) - 1."""
    bins = np.frexp(lengths)[1] - 1
    documents = np.bincount(bins, minlength=LENGTH_BINS)
    tokens = np.bincount(bins, weights=lengths, minlength=LENGTH_BINS).astype(np.int64)
    return [documents.tolist(), tokens.tolist()]
