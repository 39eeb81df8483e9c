"""Finds near duplicates: documents that share most of their runs of five words.

Sketch: MinHash (Broder 1997) makes a signature of 128 numbers of each document; the share of equal
numbers in two signatures estimates the Jaccard similarity of the documents' sets of 5-grams. The
signature is cut into bands. Each band of each document is a row, whose key is the band's hash.
Match: rows that meet, because a band of theirs is equal, are compared. Pairs that are similar
enough become edges. Star: large stars and small stars in turn (Kiveris et al. 2014) make of the
edges' connected components stars around their first document. That one is kept.

Documents are known by a number here: a bit for the split, then 63 bits of their place in the
shuffle. So the first document of a component is one of the val split if there is any, and nothing
depends on files or tasks. Memory holds LARGEST_BUCKET documents, or a batch of each of 64 runs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from rensa import RMinHash

from manta.data import passes, runs
from manta.data.decontaminate import ngram_hashes
from manta.data.order import mix_bits
from manta.data.runs import ORDER, REST, Collector, Run

NGRAM = 5
HASHES = 128  # the standard deviation of an estimate at 0.8 is 0.035
SEED = 42
RECALL = 0.99
SIGNATURE = "signature"
PLACE = "place"  # the column with where a document is
TRAIN = np.uint64(1 << 63)
TASK_ROWS = 1 << 20
COLLECTED_ROWS = 1 << 19
LARGEST_BUCKET = 1 << 14
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
EXAMPLES = 3


def version() -> list[int]:
    """What decides signatures besides the text: one preparation has one of them."""
    return [RMinHash.ALGORITHM_VERSION, NGRAM, HASHES, SEED]


def numbers(order: np.ndarray, is_val: np.ndarray) -> np.ndarray:
    """The numbers of documents, (N,) uint64, from their places in the shuffle and their splits."""
    return np.where(is_val, np.uint64(0), TRAIN) | (order >> np.uint64(1))


def range_of(split: str, low: int, high: int) -> tuple[int, int]:
    """The range of the numbers of a split's documents with places in [low, high)."""
    bit = 0 if split == "val" else int(TRAIN)
    return bit + (low >> 1), bit + ((high - 1) >> 1) + 1


@functools.cache
def rows_of_band(similarity: float) -> int:
    """How many numbers of the signature make a band: as many as find 99% of the pairs that are
    just similar enough, because at least one of their bands is equal."""

    def recall(rows: int) -> float:
        return 1 - (1 - similarity**rows) ** (HASHES // rows)

    return max(rows for rows in range(1, HASHES + 1) if rows == 1 or recall(rows) >= RECALL)


def split_of(number: int) -> str:
    return "train" if number & int(TRAIN) else "val"


def places(found: list[tuple[int, int, int]]) -> pa.Array:
    """The column of the places of documents: (part, piece in it, number in the piece)."""
    flat = pa.array(np.array(found, dtype=np.uint64).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, 3)


def signature(text: str) -> np.ndarray | None:
    """The MinHash signature of a text, (128,) uint32; None if it has fewer than five words."""
    hashes = ngram_hashes(text, NGRAM)
    if not len(hashes):
        return None
    ends = np.array([0, len(hashes)], dtype=np.uint64)
    made = RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, HASHES, SEED)
    return np.array(made.to_rows()[0], dtype=np.uint32)


def bands(signatures: np.ndarray, documents: np.ndarray, similarity: float) -> pa.Table:
    """The rows of all bands of documents, from their signatures (N, 128) and numbers (N,)."""
    rows = rows_of_band(similarity)
    count = HASHES // rows
    cut = signatures[:, : rows * count].astype(np.uint64).reshape(-1, count, rows)
    hashes = np.broadcast_to(np.arange(count, dtype=np.uint64), cut.shape[:2])
    for i in range(rows):
        hashes = mix_bits(hashes * MULTIPLIER + cut[:, :, i])
    # The lowest byte of each number is enough to compare documents that have met.
    lowest = np.repeat(signatures.astype(np.uint8), count, axis=0)
    kind = pa.binary(HASHES)
    table = {
        ORDER: hashes.ravel(),
        REST: np.repeat(documents, count),
        SIGNATURE: pa.FixedSizeBinaryArray.from_buffers(
            kind, len(lowest), [None, pa.py_buffer(lowest)]
        ),
    }
    return pa.table(table)


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimates of the Jaccard similarity, (N,), from the lowest bytes of signatures, (N, 128)."""
    by_chance = 1 / 256
    return ((a == b).mean(axis=1) - by_chance) / (1 - by_chance)


# --- match ---------------------------------------------------------------------------------------

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # the smaller number, the larger one, similarity


@dataclasses.dataclass(frozen=True)
class _Range(passes.Task):
    """A task that reads one of `count` ranges of keys of the runs."""

    path: str
    runs: list[Run]
    count: int

    def tables(self, index: int) -> Iterator[pa.Table]:
        low, high = ((i << 64) // self.count for i in (index, index + 1))
        return runs.merged(self.path, self.runs, low, high)

    def collector(self, index: int) -> Collector:
        return Collector(self.path, self.name(index), "", COLLECTED_ROWS)


@dataclasses.dataclass(frozen=True)
class Match(_Range):
    """Compares the documents that have met in range number `index` of bands' hashes."""

    similarity: float

    def name(self, index: int) -> str:
        return f"match-{index:05d}"

    def work(self, index: int) -> dict[str, Any]:
        made = self.collector(index)
        shown: list[list[Any]] = []
        for a, b, estimates in self._edges(self.tables(index)):
            made.add(_table(np.concatenate([a, b]), np.concatenate([b, a])))
            first = np.lexsort((a, b))[: EXAMPLES * HASHES]  # a pair can meet in each band
            pairs = (x.tolist() for x in (a[first], b[first], estimates[first]))
            shown = first_pairs([*shown, *map(list, zip(*pairs, strict=True))])
        return {"runs": made.close(), "pairs": shown}

    def _edges(self, tables: Iterator[pa.Table]) -> Iterator[Edges]:
        held = None
        for table in itertools.chain(tables, [None]):
            parts = [part for part in (held, table) if part is not None]
            if not parts:
                return
            held = pa.concat_tables(parts)
            held = held.filter(pa.array(runs.is_new(*runs.keys(held))))
            order = held[ORDER].to_numpy()
            # The last bucket may go on in the next table.
            whole = len(order) if table is None else int(np.searchsorted(order, order[-1]))
            yield from self._compare_whole(held.slice(0, whole))
            held = yield from self._compare_start(held.slice(whole))

    def _compare_whole(self, table: pa.Table) -> Iterator[Edges]:
        """The edges in a sorted table of whole buckets."""
        starts, sizes = _buckets(table)
        at = 0
        for large in np.flatnonzero(sizes > LARGEST_BUCKET).tolist():
            start, size = int(starts[large]), int(sizes[large])
            yield self._compare(table.slice(at, start - at))
            yield self._compare((yield from self._compare_start(table.slice(start, size))))
            at = start + size
        yield self._compare(table.slice(at))

    def _compare_start(self, bucket: pa.Table) -> Generator[Edges, None, pa.Table]:
        """The edges in a bucket, until it is small enough; returns the rest of it.

        The first documents of the groups in each piece stand for the piece in the next one.
        """
        while bucket.num_rows > LARGEST_BUCKET:
            piece = bucket.slice(0, LARGEST_BUCKET)
            found = self._compare(piece)
            yield found
            is_first = ~np.isin(piece[REST].to_numpy(), found[1])
            is_first[np.cumsum(is_first) > LARGEST_BUCKET // 2] = False
            firsts = piece.filter(pa.array(is_first))
            bucket = pa.concat_tables([firsts, bucket.slice(LARGEST_BUCKET)])
        return bucket

    def _compare(self, table: pa.Table) -> Edges:
        """The edges in a sorted table of buckets: a spanning forest of the similar documents."""
        starts, sizes = _buckets(table)
        documents = table[REST].to_numpy()
        first = np.repeat(starts, sizes)
        met = np.flatnonzero(np.repeat(sizes > 1, sizes))
        if not len(met):
            return documents[:0], documents[:0], np.zeros(0)
        column = table[SIGNATURE].take(pa.array(met)).combine_chunks()
        rows = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, HASHES)
        rows = rows[column.offset : column.offset + len(met)]
        place = np.zeros(len(documents), dtype=np.int64)
        place[met] = np.arange(len(met))
        estimates = similarities(rows, rows[place[first[met]]])
        similar = estimates >= self.similarity
        # Where all are like the first one, that is the forest. Else all have to be compared.
        mixed = np.unique(first[met[~similar]])
        mixed = mixed[sizes[np.searchsorted(starts, mixed)] > 2]
        plain = similar & (met != first[met]) & ~np.isin(first[met], mixed)
        found = [(first[met[plain]], met[plain], estimates[plain])]
        for start in mixed.tolist():
            size = int(sizes[np.searchsorted(starts, start)])
            a, b, s = _forest(rows[place[start] : place[start] + size], self.similarity)
            found.append((a + start, b + start, s))
        a, b, s = (np.concatenate(column) for column in zip(*found, strict=True))
        a, b = documents[a], documents[b]
        return np.minimum(a, b), np.maximum(a, b), s


def _buckets(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each bucket of a sorted table, and how many rows it has."""
    order = table[ORDER].to_numpy()
    starts = np.flatnonzero(np.append(True, order[1:] != order[:-1])[: len(order)])
    return starts, np.diff(np.append(starts, len(order)))


def _forest(rows: np.ndarray, similarity: float) -> Edges:
    """A spanning forest of the graph of similar rows, as indexes."""
    left = np.arange(len(rows))
    found = [(left[:0], left[:0], np.zeros(0))]
    queue: list[int] = []
    while len(left):
        if not queue:
            queue, left = [int(left[0])], left[1:]
        at = queue.pop()
        estimates = similarities(rows[left], rows[at][None])
        similar = estimates >= similarity
        next_ones = left[similar]
        found.append((np.full(len(next_ones), at), next_ones, estimates[similar]))
        queue += next_ones.tolist()
        left = left[~similar]
    a, b, s = zip(*found, strict=True)
    return np.concatenate(a), np.concatenate(b), np.concatenate(s)


def first_pairs(pairs: list[list[Any]]) -> list[list[Any]]:
    """The first few of [number, larger number, similarity], each one once."""
    distinct = {(b, a): [a, b, round(s, 3)] for a, b, s in pairs}
    return [distinct[key] for key in sorted(distinct)[:EXAMPLES]]


# --- star ----------------------------------------------------------------------------------------


def _table(a: np.ndarray, b: np.ndarray) -> pa.Table:
    return pa.table({ORDER: a, REST: b})


@dataclasses.dataclass(frozen=True)
class Star(_Range):
    """Turns the edges of the documents in range number `index` into edges to smaller numbers.

    A large star ties a document's larger neighbours to the smallest document around, itself
    included. A small star ties the document and its smaller neighbours to the smallest of these.
    Its edges are written in both directions, for the large star that follows, which reads all
    neighbours of a document; a small star reads only the smaller ones.
    """

    round: int

    @property
    def is_large(self) -> bool:
        return self.round % 2 == 0

    def name(self, index: int) -> str:
        return f"star-{self.round}-{index:05d}"

    def work(self, index: int) -> dict[str, Any]:
        made = self.collector(index)
        unsettled = 0
        group: tuple[int, int] | None = None  # the last document so far, and its first neighbour
        last: tuple[int, int] | None = None
        for table in self.tables(index):
            table = table.filter(pa.array(runs.is_new(*runs.keys(table))))
            if (table[ORDER][0].as_py(), table[REST][0].as_py()) == last:
                table = table.slice(1)  # the same edge, which ended the table before
            if not table.num_rows:
                continue
            at, neighbours = runs.keys(table)
            starts = np.append(True, at[1:] != at[:-1])
            firsts = neighbours[starts][np.cumsum(starts) - 1]
            if group is not None and group[0] == int(at[0]):
                firsts[at == at[0]] = group[1]
            group, last = (int(at[-1]), int(firsts[-1])), (int(at[-1]), int(neighbours[-1]))
            if self.is_large:
                # In a star, a document with a smaller neighbour has no other neighbours.
                unsettled += int(((firsts < at) & (neighbours != firsts)).sum())
                larger = neighbours > at
                made.add(_table(neighbours[larger], np.minimum(at, firsts)[larger]))
            else:
                others = neighbours != firsts
                a = np.concatenate([neighbours[others], at[~others]])
                b = np.concatenate([firsts[others], firsts[~others]])
                made.add(_table(np.concatenate([a, b]), np.concatenate([b, a])))
        return {"runs": made.close(), "unsettled": unsettled}


@dataclasses.dataclass(frozen=True)
class Found:
    """Runs of [number of a near duplicate, number of the document that is kept instead], and the
    first few pairs of [number, larger number, similarity]."""

    dropped: list[Run]
    pairs: list[list[Any]]


def locate(path: str, documents: list[Run], number: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """The place in the corpus of (the first copy of) a document, and its tokens, from the runs of
    the documents of its split."""
    low = number % int(TRAIN) << 1
    tables = [table for run in documents for table in runs.read(path, run, low, low + 2)]
    rows = (row for table in tables for row in table.to_pylist())
    first = min(rows, key=lambda row: tuple(row[PLACE]))
    part, piece, row = first[PLACE]
    return (part, piece, row), np.array(first["tokens"])


def find(path: str, bands: list[Run], similarity: float) -> Found:
    """Finds the near duplicates among the documents whose bands are in these runs, and deletes the
    runs."""
    title = "finding near duplicates"
    bands = runs.merge(path, bands, "bands")
    made = _pass(Match(path, bands, _tasks(bands), similarity), title)
    pairs = first_pairs([pair for record in made for pair in record["pairs"]])
    return Found(contract(path, _runs(made), title), pairs)


def contract(path: str, edges: list[Run], title: str) -> list[Run]:
    """Runs of [number, smallest number that is connected with it], for each number that is not the
    smallest one. The runs of edges, which have each edge in both directions, are deleted."""
    name = "match"
    for number in itertools.count():
        edges = runs.merge(path, edges, name)
        made = _pass(Star(path, edges, _tasks(edges), number), f"{title}, round {number + 1}")
        name, edges = f"star-{number}", _runs(made)
        if number % 2 == 0 and not sum(record["unsettled"] for record in made):
            break
    return runs.merge(path, edges, name)


def _runs(made: list[dict[str, Any]]) -> list[Run]:
    return [run for record in made for run in record["runs"]]


def _tasks(found: list[Run]) -> int:
    return -(-sum(run["rows"] for run in found) // TASK_ROWS)


def _pass(task: _Range, title: str) -> list[dict[str, Any]]:
    """Runs a task over its ranges, and deletes what it has read."""
    made = passes.run(task, task.count, title, "tasks")
    runs.delete(task.path, task.runs)
    return made
