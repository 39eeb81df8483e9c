"""Sorted runs: Arrow files of rows that are sorted by two 64-bit keys, read in ranges and merged.

Whoever needs a range of keys reads a piece of every run. So that this stays few pieces, however
large the corpus, runs are first merged until there are at most FAN_IN: each task of a merge turns
FAN_IN runs into one, and deletes them. Memory holds a batch of each run.
"""

import bisect
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from manta import storage
from manta.data import passes
from manta.data.passes import WORK
from manta.errors import DataError

# The record of a run: its file, the first key of each of its batches ("starts"), and totals.
Run = dict[str, Any]
FAN_IN = 64
MERGED_BATCH_BYTES = 2 << 20
ORDER, REST = "order", "rest"  # the columns of the keys, uint64 each
END = 1 << 64


def write(path: str, file: str, table: pa.Table, starts: Sequence[int]) -> Run:
    """Writes a sorted table as a run, in batches that begin at these rows.

    The record lacks the totals.
    """
    pieces = zip(starts, [*starts[1:], table.num_rows], strict=True)
    return write_batches(path, file, (_batch(table.slice(a, b - a)) for a, b in pieces))


def write_batches(path: str, file: str, batches: Iterable[pa.RecordBatch]) -> Run:
    """Writes sorted batches, at least one, as a run, without holding more than one of them."""
    starts: list[int] = []
    writer = None
    with storage.HashingWriter(storage.join(path, WORK, file)) as sink:
        for batch in batches:
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            starts.append(batch[ORDER][0].as_py())
        assert writer is not None
        writer.close()
        sink.commit()
    return {"file": file, "starts": starts}


def _batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def read(path: str, run: Run, low: int = 0, high: int = END) -> Iterator[pa.Table]:
    """Yields the rows of a run whose first key is in [low, high), a batch at a time.

    Raises:
        DataError: the file is missing or damaged.
    """
    starts = run["starts"]
    first = max(0, bisect.bisect_left(starts, low) - 1)
    last = bisect.bisect_left(starts, high)
    if first >= last:
        return
    file = storage.join(path, WORK, run["file"])
    try:
        with _opened(file) as reader:
            for i in range(first, last):
                batch = reader.get_batch(i)
                order = batch[ORDER].to_numpy()
                a = int(np.searchsorted(order, np.uint64(low), side="left"))
                b = int(np.searchsorted(order, np.uint64(high - 1), side="right"))
                if a < b:
                    yield pa.Table.from_batches([batch.slice(a, b - a)])
    except (OSError, pa.ArrowInvalid) as e:
        raise DataError(
            f"{file}: cannot be read ({e}); delete {path} and run the same command again"
        ) from None


@contextlib.contextmanager
def _opened(file: str) -> Iterator[pa.ipc.RecordBatchFileReader]:
    fs, inside = storage.filesystem(file)
    with fs.open_input_file(inside) as f, pa.ipc.open_file(f) as reader:
        yield reader


def sort(table: pa.Table) -> pa.Table:
    order, rest = keys(table)
    return table.take(pa.array(np.lexsort((rest, order))))


def keys(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The two keys of each row, (N,) uint64 each."""
    return table[ORDER].to_numpy(), table[REST].to_numpy()


def is_new(order: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Whether each of the sorted rows has other keys than the row before it, (N,) bool."""
    found = np.ones(len(order), dtype=bool)
    found[1:] = (order[1:] != order[:-1]) | (rest[1:] != rest[:-1])
    return found


def merged(path: str, found: Sequence[Run], low: int = 0, high: int = END) -> Iterator[pa.Table]:
    """Yields the rows of all runs whose first key is in [low, high), sorted, in small tables.

    Raises:
        DataError: a file is missing or damaged.
    """
    batches = [read(path, run, low, high) for run in found]
    held = {i: table for i, rows in enumerate(batches) if (table := next(rows, None)) is not None}
    while held:
        # No run has more rows up to the smallest of the last keys that are held.
        bound = min(_last(table) for table in held.values())
        pieces = []
        for i, table in list(held.items()):
            count = _rows_up_to(bound, table)
            pieces.append(table.slice(0, count))
            left = table.slice(count) if count < table.num_rows else next(batches[i], None)
            if left is None:
                del held[i]
            else:
                held[i] = left
        yield sort(pa.concat_tables(pieces))


def _last(table: pa.Table) -> tuple[int, int]:
    return table[ORDER][-1].as_py(), table[REST][-1].as_py()


def _rows_up_to(key: tuple[int, int], table: pa.Table) -> int:
    order, rest = keys(table)
    a = int(np.searchsorted(order, np.uint64(key[0]), side="left"))
    b = int(np.searchsorted(order, np.uint64(key[0]), side="right"))
    return a + int(np.searchsorted(rest[a:b], np.uint64(key[1]), side="right"))


class Collector:
    """Writes rows that come in any order as sorted runs of at most `size` rows and those of the
    last call."""

    def __init__(self, path: str, name: str, ending: str, size: int):
        self._path, self._name, self._ending, self._size = path, name, ending, size
        self._held: list[pa.Table] = []
        self.runs: list[Run] = []

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        if sum(held.num_rows for held in self._held) >= self._size:
            self.close()

    def close(self) -> list[Run]:
        """Writes what is held; returns the records of all runs."""
        held = [table for table in self._held if table.num_rows]
        self._held = []
        if held:
            table = sort(pa.concat_tables(held))
            table = table.filter(pa.array(is_new(*keys(table))))
            step = max(1, MERGED_BATCH_BYTES * table.num_rows // max(1, table.nbytes))
            file = f"{self._name}-{len(self.runs):03d}{self._ending}.arrow"
            run = write(self._path, file, table, range(0, table.num_rows, step))
            self.runs.append({**run, "rows": table.num_rows})
        return self.runs


@dataclasses.dataclass(frozen=True)
class Merge(passes.Task):
    """Merges group number `index` of runs into one, and deletes them."""

    path: str
    title: str
    groups: list[list[Run]]

    def name(self, index: int) -> str:
        return f"merge-{self.title}-{index:05d}"

    def run(self, index: int) -> Run:
        record = passes.record_path(self.path, self.name(index))
        if storage.exists(record):  # Ray repeats a task whose node was lost; its runs are gone
            return storage.read_json(record)
        made = super().run(index)
        delete(self.path, self.groups[index])
        return made

    def work(self, index: int) -> Run:
        group = self.groups[index]
        file = f"{self.name(index)}.arrow"
        made = write_batches(self.path, file, _batches(merged(self.path, group)))
        first = group[0]
        totals = {k: sum(run[k] for run in group) for k in first if isinstance(first[k], int)}
        return {**first, **totals, **made}


def _batches(tables: Iterator[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Joins small tables into batches of about MERGED_BATCH_BYTES."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= MERGED_BATCH_BYTES:
            yield _batch(pa.concat_tables(held))
            held, size = [], 0
    if held:
        yield _batch(pa.concat_tables(held))


def merge(path: str, found: list[Run], title: str) -> list[Run]:
    """Merges runs until at most FAN_IN are left; those found are deleted as they are merged."""
    level = 0
    while len(found) > FAN_IN:
        groups, others = _groups(found)
        task = Merge(path, f"{title}-{level}", groups)
        made = passes.run(task, len(groups), f"merging {title}", "groups of runs")
        for group in groups:  # a task may have been killed between its record and its end
            delete(path, group)
        found = [*made, *others]
        level += 1
    return found


def _groups(found: list[Run]) -> tuple[list[list[Run]], list[Run]]:
    """The runs to merge, in groups, and those to leave: no more are merged than have to be."""
    excess = len(found) - FAN_IN
    count = -(-excess // (FAN_IN - 1))  # a group of n runs makes n - 1 runs fewer
    merging = min(len(found), excess + count)
    groups = [found[i : min(i + FAN_IN, merging)] for i in range(0, merging, FAN_IN)]
    return groups, found[merging:]


def delete(path: str, found: list[Run]) -> None:
    """Deletes the files of runs, if they are there still."""
    for run in found:
        file = storage.join(path, WORK, run["file"])
        if storage.exists(file):
            storage.delete_file(file)
