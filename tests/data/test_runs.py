"""Sorted runs: ranges and merges, by property; and how many pieces a shard reads."""

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.datasets import refusal
from helpers.preparing import Killed, killed_at, without_ray
from manta import storage
from manta.data import runs
from manta.data.runs import ORDER, REST
from manta.data.shuffle import Gather

Row = tuple[int, int]
keys = st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def written(folder: str, rows: list[list[Row]], step: int) -> list[runs.Run]:
    """Writes each list as a run, in batches of `step` rows."""
    found = []
    for number, some in enumerate(rows):
        order, rest = (
            np.array(column, dtype=np.uint64) for column in zip(*sorted(some), strict=True)
        )
        table = pa.table({ORDER: order, REST: rest, "run": np.full(len(order), number)})
        run = runs.write(folder, f"part-{number:05d}.arrow", table, range(0, len(order), step))
        found.append({**run, "rows": len(order), "split": "train"})
    return found


def pairs(tables: Any) -> list[Row]:
    return [
        pair
        for table in tables
        for pair in zip(table[ORDER].to_pylist(), table[REST].to_pylist(), strict=True)
    ]


some_runs = st.lists(
    st.lists(st.tuples(keys, st.integers(0, 2)), min_size=1, max_size=20), min_size=1, max_size=9
)


@settings(deadline=None, max_examples=60)
@given(some_runs, st.integers(1, 6), st.integers(2, 4), st.integers(1, 200), keys, keys)
@example([[(5, 0)] * 10, [(5, 0)] * 3 + [(5, 1)]], 1, 2, 1, 5, 5)
def test_runs_merged_or_not_have_the_same_rows_in_order(
    rows: list[list[Row]], step: int, fan_in: int, batch: int, a: int, b: int
) -> None:
    low, high = min(a, b), max(a, b) + 1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FAN_IN", fan_in)
        patch.setattr(runs, "MERGED_BATCH_BYTES", batch)
        found = written(folder, rows, step)
        whole = sorted(row for some in rows for row in some)
        wanted = [row for row in whole if low <= row[0] < high]
        assert pairs(runs.merged(folder, found)) == whole
        assert pairs(runs.merged(folder, found, low, high)) == wanted
        few = runs.merge(folder, found, "train")
        assert len(few) <= fan_in
        assert pairs(runs.merged(folder, few)) == whole
        assert pairs(runs.merged(folder, few, low, high)) == wanted
        assert sum(run["rows"] for run in few) == len(whole)
        left = {file.name for file in Path(folder, "work").glob("*.arrow")}
        assert left == {run["file"] for run in few}  # what was merged is deleted


@given(st.integers(1, 30_000), st.integers(2, 64))
def test_no_more_is_merged_than_has_to_be(count: int, fan_in: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FAN_IN", fan_in)
        found: list[Any] = [{"size": 1}] * count
        read = 0
        levels = 0
        while len(found) > fan_in:
            groups, others = runs._groups(found)
            assert all(len(group) <= fan_in for group in groups)
            read += sum(run["size"] for group in groups for run in group)
            found = [{"size": sum(r["size"] for r in group)} for group in groups] + others
            levels += 1
        assert sum(run["size"] for run in found) == count
        assert fan_in**levels < max(count, 2)
        assert read <= levels * count
        if count == fan_in + 1:
            assert read == 2


def tiny_runs(folder: Path, count: int, documents: int = 3) -> list[runs.Run]:
    """Runs of a few documents, as the first pass writes them, of which some occur twice."""
    draw = np.random.default_rng(0)
    first = np.zeros(1, dtype=np.uint64)
    found = []
    for number in range(count):
        order = np.sort(draw.integers(0, 2**64, documents, dtype=np.uint64))
        if number % 10 == 9:
            order = np.sort(np.append(order[1:], first))
        first = order[:1]
        tokens = [
            np.append((o % np.arange(3, 9, dtype=np.uint64)), 9).astype(np.uint16) for o in order
        ]
        columns = {
            ORDER: order,
            REST: order * np.uint64(3),
            "text_bytes": np.full(documents, 6, np.uint32),
            "tokens": pa.LargeListArray.from_arrays(
                np.cumsum([0, *map(len, tokens)]), np.concatenate(tokens)
            ),
        }
        run = runs.write(str(folder), f"part-{number:05d}-000-train.arrow", pa.table(columns), [0])
        totals = {"documents": documents, "tokens": 7 * documents, "text_bytes": 6 * documents}
        found.append({**run, "split": "train", **totals})
    return found


def gathered(
    folder: Path, found: list[runs.Run], shards: int
) -> tuple[dict[str, bytes], list[Any]]:
    gather = Gather(str(folder), found, (shards, 0), "uint16", 64)
    records = [gather.run(index) for index in range(shards)]
    return {file.name: file.read_bytes() for file in folder.glob("*.parquet")}, records


@pytest.mark.parametrize(
    ("count", "fan_in"), [(300, 8), pytest.param(10_000, 64, marks=pytest.mark.long)]
)
def test_a_shard_reads_few_runs_however_many_there_were_and_has_the_same_bytes(
    count: int, fan_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = 3
    monkeypatch.setattr(runs, "FAN_IN", fan_in)
    monkeypatch.setattr(storage, "sync", lambda file: None)  # ten thousand of them take a minute
    opened: Counter[str] = Counter()
    real = runs._opened

    def counted(file: str) -> Any:
        opened["reads"] += 1
        return real(file)

    monkeypatch.setattr(runs, "_opened", counted)
    found = tiny_runs(tmp_path, count)
    expected, before = gathered(tmp_path, found, shards)
    assert opened["reads"] > shards * count / 2
    few = runs.merge(str(tmp_path), found, "train")
    assert len(few) == fan_in
    opened.clear()
    again, after = gathered(tmp_path, few, shards)
    assert again == expected and after == before
    assert opened["reads"] <= shards * fan_in
    assert sum(record["duplicates"] for record in after) == count // 10


def test_the_disk_holds_little_more_than_once_what_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FAN_IN", 4)
    found = tiny_runs(tmp_path, 60)
    files = lambda: [file.stat().st_size for file in (tmp_path / "work").glob("*.arrow")]  # noqa: E731
    before, most = sum(files()), 0
    real = runs.write_batches

    def measured(*arguments: Any) -> runs.Run:
        nonlocal most
        made = real(*arguments)
        most = max(most, sum(files()))
        return made

    monkeypatch.setattr(runs, "write_batches", measured)
    few = runs.merge(str(tmp_path), found, "train")
    largest = max((tmp_path / "work" / run["file"]).stat().st_size for run in few)
    assert most <= before + largest


@pytest.mark.parametrize("write", range(1, 40, 3))
@pytest.mark.parametrize("named", [False, True])
def test_stopped_at_any_write_of_a_merge_it_goes_on_to_the_same_rows(
    write: int, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FAN_IN", 3)
    found = tiny_runs(tmp_path, 20)
    expected = pairs(runs.merged(str(tmp_path), found))
    with killed_at(write, named):
        runs.merge(str(tmp_path), found, "train")
    storage.remove_unfinished(str(tmp_path))
    few = runs.merge(str(tmp_path), found, "train")
    assert pairs(runs.merged(str(tmp_path), few)) == expected
    left = {file.name for file in (tmp_path / "work").glob("*.arrow")}
    assert left == {run["file"] for run in few}


def test_stopped_while_it_deletes_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FAN_IN", 3)
    found = tiny_runs(tmp_path, 9)
    expected = pairs(runs.merged(str(tmp_path), found))
    real, deleted = storage.delete_file, 0

    def stop(path: str) -> None:
        nonlocal deleted
        deleted += 1
        if deleted == 2:
            raise Killed
        real(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "delete_file", stop)
        runs.merge(str(tmp_path), found, "train")
    few = runs.merge(str(tmp_path), found, "train")
    assert pairs(runs.merged(str(tmp_path), few)) == expected
    assert len(list((tmp_path / "work").glob("*.arrow"))) == len(few)


def test_a_merge_that_ray_repeats_returns_its_record(tmp_path: Path) -> None:
    task = runs.Merge(str(tmp_path), "train-0", [tiny_runs(tmp_path, 5)])
    first = task.run(0)
    assert task.run(0) == first
    assert not (tmp_path / "work" / "part-00000-000-train.arrow").exists()


def test_a_run_that_is_gone_is_named(tmp_path: Path) -> None:
    found = tiny_runs(tmp_path, 2)
    file = tmp_path / "work" / found[1]["file"]
    os.truncate(file, 10)
    said = refusal(lambda: list(runs.merged(str(tmp_path), found)))
    assert said.startswith(f"{file}: cannot be read (")
    assert said.endswith(f"; delete {tmp_path} and run the same command again")
