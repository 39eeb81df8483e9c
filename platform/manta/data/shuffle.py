"""Shuffles documents and drops duplicates, whatever their number, in two passes over disk.

Scatter: each part's documents are tokenized and written in runs, sorted by a hash of their text.
Gather: each shard takes the documents of one range of hashes from all runs, sorted. So documents
come in a random order that depends on their texts and the seed, and on nothing else: neither on the
files they were in, nor on which process read them when. Equal documents meet, and all but one are
dropped. Memory holds one run, or one shard. Between the two, many runs are merged into few
(`runs`), and near duplicates are found (`near`).

work/part-00007-000-train.arrow   a run         work/part-00007.json    record of a part
                                                work/train-00003.json   record of a shard
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from manta import storage
from manta.data import near, runs
from manta.data.conversations import Encoder, Unlabelled
from manta.data.decontaminate import Decontaminator
from manta.data.manifest import Shard
from manta.data.order import fold, mix_bits
from manta.data.packing import fill
from manta.data.passes import Task
from manta.data.preferences import PairEncoder
from manta.data.recipe import Chat
from manta.data.runs import ORDER, REST, Collector, Run
from manta.data.shards import ShardWriter
from manta.text import conversations, sources, tokenizer
from manta.text.rows import BadRow, BadRows
from manta.text.tokenizer import Tokenizer

SPLITS = ("train", "val")
RUN_BYTES = 64 << 20  # of text
RUN_SIGNATURES = 1 << 16
BATCH_TOKENS = 1 << 17  # the smallest piece of a run that is read
BAND_DOCUMENTS = 1 << 13  # whose bands are made at a time
LENGTH_BINS = 40
KEY_BYTES = 24


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


@dataclasses.dataclass(frozen=True)
class Scatter(Task):
    """Tokenizes part number `index` into runs."""

    path: str
    parts: list[sources.Part]
    tokenizer: bytes
    seed: int
    val: float | sources.Source
    """The val split: a share of the documents, or all documents of a source."""
    decontaminator: Decontaminator | None = None
    similarity: float | None = None
    """The least similarity of near duplicates, if their bands are to be written."""
    chat: Chat | None = None
    """How conversations are encoded, if the documents are conversations."""

    def name(self, index: int) -> str:
        return part_name(index)

    def work(self, index: int) -> dict[str, Any]:
        made = tokenizer.from_bytes(self.tokenizer)
        encode = _encoder(made, self.chat)
        part, name = self.parts[index], part_name(index)
        written: list[Run] = []
        dropped = {"empty": 0, "contaminated": 0}
        with_signatures = self.similarity is not None
        held = _Held(with_signatures)
        bands = Collector(self.path, name, "-bands", near.COLLECTED_ROWS)
        cut: Counter[str] = Counter()
        bad = BadRows(part.source.on_bad_rows)
        unlabelled = BadRows(self.chat.on_unlabelled if self.chat else "fail", "data.on_unlabelled")
        for piece, number, text in sources.located_documents(part, bad):
            words = text if self.chat is None else conversations.plain(text)
            if not words.strip():
                dropped["empty"] += 1
            elif self.decontaminator is not None and self.decontaminator.contaminated(words):
                dropped["contaminated"] += 1
            else:
                try:
                    ids, is_cut = encode(text)
                except BadRow as e:
                    rows = unlabelled if isinstance(e, Unlabelled) else bad
                    unit = "pair" if part.source.kind == "preference" else "conversation"
                    place = f"{sources.name_of_piece(part, piece)}, {unit} {number}"
                    rows.add(e, part.file(piece), functools.partial(str, place))
                    continue
                cut[part.file(piece)] += is_cut
                held.add(text, words, ids, (index, piece, number))
            if held.text_bytes >= RUN_BYTES or len(held.signatures) >= RUN_SIGNATURES:
                written += self._write(held, index, f"{name}-{len(written):03d}", bands)
                held = _Held(with_signatures)
        if held.documents:
            written += self._write(held, index, f"{name}-{len(written):03d}", bands)
        record = {
            "runs": written, "bands": bands.close(), "dropped": dropped, "skipped": bad.counts,
        }  # fmt: skip
        if self.chat is not None:
            record |= {"unlabelled": unlabelled.counts, "cut": {f: n for f, n in cut.items() if n}}
        return record

    def _write(
        self, held: "_Held", index: int, name: str, bands: Collector | None = None
    ) -> list[Run]:
        key = Key.of(held.digests, self.seed)
        if isinstance(self.val, sources.Source):
            is_val = np.full(len(held.digests), self.parts[index].source == self.val)
        else:
            is_val = key.is_val(self.val)
        if bands is not None and self.similarity is not None:
            for start in range(0, len(held.digests), BAND_DOCUMENTS):
                these = range(start, min(start + BAND_DOCUMENTS, len(held.digests)))
                rows = [i for i in these if held.signatures[i] is not None]
                if rows:
                    found = np.array([held.signatures[i] for i in rows])
                    documents = near.numbers(key.order[rows], is_val[rows])
                    bands.add(near.bands(found, documents, self.similarity))
        written = []
        for split, wanted in zip(SPLITS, (~is_val, is_val), strict=True):
            chosen = np.flatnonzero(wanted)
            chosen = chosen[np.lexsort((key.rest[chosen], key.order[chosen]))]
            if not len(chosen):
                continue
            tokens = [held.documents[i] for i in chosen]
            offsets = np.cumsum([0, *map(len, tokens)])
            columns = {
                ORDER: key.order[chosen],
                REST: key.rest[chosen],
                "text_bytes": np.asarray(held.sizes, dtype=np.uint32)[chosen],
                "tokens": pa.LargeListArray.from_arrays(offsets, np.concatenate(tokens)),
            }
            if self.similarity is not None:
                columns[near.PLACE] = near.places([held.places[i] for i in chosen])
            run = runs.write(self.path, f"{name}-{split}.arrow", pa.table(columns), _cuts(offsets))
            totals = {
                "documents": len(chosen),
                "tokens": int(offsets[-1]),
                "text_bytes": int(np.asarray(held.sizes)[chosen].sum()),
            }
            written.append({**run, "split": split, **totals})
        return written


class _Held:
    """The documents of a run, before the run is sorted."""

    def __init__(self, with_signatures: bool):
        self._with_signatures = with_signatures
        self.documents: list[np.ndarray] = []
        self.digests: list[bytes] = []
        self.sizes: list[int] = []
        self.text_bytes = 0
        self.places: list[tuple[int, int, int]] = []
        self.signatures: list[np.ndarray | None] = []

    def add(self, text: str, words: str, ids: np.ndarray, place: tuple[int, int, int]) -> None:
        """Adds a document; `words` is the text, or all that is said in a conversation."""
        data = text.encode()
        size = len(words.encode())
        self.documents.append(ids)
        self.digests.append(Key.digest(data))
        self.sizes.append(size)
        self.text_bytes += size
        if self._with_signatures:
            self.places.append(place)
            self.signatures.append(near.signature(words))


def _encoder(made: Tokenizer, chat: Chat | None) -> Callable[[str], tuple[np.ndarray, bool]]:
    if chat is not None:
        return (PairEncoder if chat.kind == "preference" else Encoder)(made, chat)
    return lambda text: (made.document(text), False)


def _cuts(offsets: np.ndarray) -> list[int]:
    """The index of the first document of each batch of about BATCH_TOKENS tokens."""
    batch_of = offsets[:-1] // BATCH_TOKENS
    return [0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist()]


@dataclasses.dataclass(frozen=True)
class Gather(Task):
    """Writes shard number `index`; `counts` is (train shards, val shards), train first."""

    path: str
    runs: list[Run]
    counts: tuple[int, int]
    dtype: str
    row_group_tokens: int
    deduplicate: str = "exact"
    near_duplicates: list[Run] = dataclasses.field(default_factory=list)
    """Runs of the numbers of near duplicates (`near.Found`)."""
    chat: Chat | None = None
    """The rows of whole conversations; None: documents follow each other."""
    padding: int = 0
    """Id of the token that fills the rest of a row."""

    def name(self, index: int) -> str:
        return shard_name(*self.place(index)[:2])

    def place(self, index: int) -> tuple[str, int, int]:
        """Returns (split, number of the shard in the split, number of shards in the split)."""
        train, val = self.counts
        return ("train", index, train) if index < train else ("val", index - train, val)

    def work(self, index: int) -> dict[str, Any]:
        split, number, count = self.place(index)
        low, high = ((i << 64) // count for i in (number, number + 1))
        mine = [run for run in self.runs if run["split"] == split]
        pieces = [piece for run in mine for piece in runs.read(self.path, run, low, high)]
        record: dict[str, Any] = {
            "shard": None,
            "duplicates": 0,
            "near_duplicates": 0,
            "lengths": [],
        }
        if not pieces:
            return record
        table = pa.concat_tables(pieces)
        order, rest = runs.keys(table)
        sorting = np.lexsort((rest, order))
        order, rest = order[sorting], rest[sorting]
        is_kept = np.ones(len(order), dtype=bool)
        if self.deduplicate != "none":
            is_kept = runs.is_new(order, rest)
        record["duplicates"] = len(order) - int(is_kept.sum())
        if self.near_duplicates:
            found = near.numbers(order, np.full(len(order), split == "val"))
            is_near = is_kept & np.isin(found, self._near_duplicates(split, low, high))
            record["near_duplicates"] = int(is_near.sum())
            is_kept &= ~is_near
        return record | (self._write(table, sorting[is_kept], index) if is_kept.any() else {})

    def _near_duplicates(self, split: str, low: int, high: int) -> np.ndarray:
        """The numbers of the near duplicates with places in [low, high), (N,) uint64."""
        first, last = near.range_of(split, low, high)
        tables = (t for run in self.near_duplicates for t in runs.read(self.path, run, first, last))
        return np.concatenate([np.zeros(0, np.uint64), *(t[ORDER].to_numpy() for t in tables)])

    def _write(self, table: pa.Table, kept: np.ndarray, index: int) -> dict[str, Any]:
        """Writes the shard of these rows of the table."""
        split, name = self.place(index)[0], self.name(index)
        lists = table["tokens"].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
        starts, stops = offsets[kept], offsets[kept + 1]
        if self.chat is None:
            tokens = np.concatenate([values[a:b] for a, b in zip(starts, stops, strict=True)])
        else:
            order = table[ORDER].to_numpy()[kept]
            tokens = rows_of_whole(values, starts, stops, order, self.chat.row_tokens, self.padding)
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
            "lengths": length_counts(stops - starts),
        }


def rows_of_whole(
    values: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    order: np.ndarray,
    row_tokens: int,
    padding: int,
) -> np.ndarray:
    """Rows of whole conversations, one after the other, (rows x row_tokens,).

    The place of the longest conversation in the shuffle decides on the place of its row, so that
    rows come in a random order too.
    """
    filled = fill((stops - starts).tolist(), row_tokens)
    filled.sort(key=lambda row: int(order[row[0]]))
    tokens = np.full((len(filled), row_tokens), padding, values.dtype)
    for row, documents in zip(tokens, filled, strict=True):
        joined = np.concatenate([values[starts[i] : stops[i]] for i in documents])
        row[: len(joined)] = joined
    return tokens.reshape(-1)


def length_counts(lengths: np.ndarray) -> list[list[int]]:
    """Returns [documents, tokens] by length: bin i is for lengths 2^i to 2^(i+1) - 1."""
    bins = np.frexp(lengths)[1] - 1
    documents = np.bincount(bins, minlength=LENGTH_BINS)
    tokens = np.bincount(bins, weights=lengths, minlength=LENGTH_BINS).astype(np.int64)
    return [documents.tolist(), tokens.tolist()]
