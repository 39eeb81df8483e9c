"""Near duplicates, by property: against Jaccard similarities and components found by brute force,
and the same whatever the tasks, the runs and the order."""

import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.preparing import without_ray
from manta.data import near, runs
from manta.data.runs import ORDER, REST, Collector
from manta.data.shuffle import Key

WORDS = [f"word{i}" for i in range(300)]
SIMILARITY = 0.8
VAL = 0.3


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + near.NGRAM]) for i in range(len(words) - near.NGRAM + 1)}


def jaccard(a: str, b: str) -> float:
    both = ngrams(a) | ngrams(b)
    return len(ngrams(a) & ngrams(b)) / len(both) if both else 0.0


def edited(draw: random.Random, text: str, changes: int) -> str:
    words = text.split()
    for _ in range(changes):
        words[draw.randrange(len(words))] = draw.choice(WORDS)
    return " ".join(words)


def some_texts(seed: int, count: int = 30) -> list[str]:
    """Distinct texts, among which are copies, and copies of copies, with some words changed."""
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        if texts and draw.random() < 0.6:
            texts.append(edited(draw, draw.choice(texts), draw.choice([1, 1, 2, 4, 8, 16])))
        else:
            texts.append(" ".join(draw.choices(WORDS, k=draw.randint(2, 150))))
    return list(dict.fromkeys(texts))


def numbers_of(texts: list[str]) -> list[int]:
    key = Key.of([Key.digest(text.encode()) for text in texts], 0)
    return near.numbers(key.order, key.is_val(VAL)).tolist()


def bands_of(texts: list[str], folder: str, files: int, rows: int) -> list[runs.Run]:
    found = []
    numbers = numbers_of(texts)
    for file in range(files):
        made = Collector(folder, f"part-{file:05d}", "-bands", rows)
        for text, number in list(zip(texts, numbers, strict=True))[file::files]:
            signature = near.signature(text)
            if signature is not None:
                one = np.array([number], dtype=np.uint64)
                made.add(near.bands(signature[None], one, SIMILARITY))
        found += made.close()
    return found


def rows_of(path: str, found: list[runs.Run]) -> list[tuple[int, int]]:
    tables = list(runs.merged(path, found))
    return [
        (a, b)
        for t in tables
        for a, b in zip(t[ORDER].to_pylist(), t[REST].to_pylist(), strict=True)
    ]


def dropped_of(texts: list[str], files: int = 2, rows: int = 500) -> list[tuple[int, int]]:
    with tempfile.TemporaryDirectory() as folder:
        found = near.find(folder, bands_of(texts, folder, files, rows), SIMILARITY)
        return rows_of(folder, found.dropped)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_what_is_dropped_is_similar_to_something_and_what_is_kept_is_not(seed: int) -> None:
    """The margins are five standard deviations of an estimate."""
    texts = some_texts(seed)
    text_of = dict(zip(numbers_of(texts), texts, strict=True))
    dropped = dict(dropped_of(texts))
    for number, kept in dropped.items():
        assert kept < number and kept not in dropped
        others = (other for other in text_of if other != number)
        assert max(jaccard(text_of[number], text_of[o]) for o in others) > 0.6
    kept = [text for number, text in text_of.items() if number not in dropped]
    for a, b in itertools.combinations(kept, 2):
        assert jaccard(a, b) < 0.93


def test_estimates_are_of_the_jaccard_similarity() -> None:
    draw = random.Random(0)
    errors = []
    for _ in range(200):
        a = " ".join(draw.choices(WORDS, k=200))
        b = edited(draw, a, draw.randint(0, 60))
        one, other = (near.signature(text).astype(np.uint8)[None] for text in (a, b))  # type: ignore[union-attr]
        errors.append(near.similarities(one, other)[0] - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01  # four standard deviations of the mean
    assert 0.02 < np.std(errors) < 0.05


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_99_of_100_pairs_that_are_just_similar_enough(similarity: float) -> None:
    rows = near.rows_of_band(similarity)
    pairs = np.random.default_rng(0).random((20_000, near.HASHES)) < similarity
    cut = pairs[:, : near.HASHES // rows * rows].reshape(len(pairs), -1, rows)
    assert cut.all(axis=2).any(axis=1).mean() > 0.987


def test_case_and_punctuation_do_not_count_and_short_texts_have_no_near_duplicates() -> None:
    texts = [
        "One two three, four five!",
        "one two three four FIVE",
        "one two three four",
        "One, two three four",
    ]
    dropped = dropped_of(texts)
    assert {number for number, _ in dropped} == {max(numbers_of(texts[:2]))}


@pytest.mark.parametrize("seed", range(3))
def test_the_same_ones_are_dropped_whatever_the_tasks_and_runs(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(seed, 60)
    expected = dropped_of(texts, files=1, rows=10**6)
    assert expected
    draw = random.Random(seed)
    for task_rows, collected, fan_in, files in (
        (10**6, 10**6, 2, 5),
        (400, 50, 3, 3),
        (37, 7, 2, 1),
    ):
        monkeypatch.setattr(near, "TASK_ROWS", task_rows)
        monkeypatch.setattr(near, "COLLECTED_ROWS", collected)
        monkeypatch.setattr(runs, "FAN_IN", fan_in)
        assert dropped_of(draw.sample(texts, len(texts)), files, collected) == expected


# --- large buckets -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_bucket_too_large_for_memory_is_compared_in_the_same_pieces(seed: int, step: int) -> None:
    """All documents are in one bucket; its rows come in tables of other sizes."""
    draw = np.random.default_rng(seed)
    groups = draw.integers(0, 256, (4, near.HASHES), dtype=np.uint8)
    group_of = draw.integers(0, len(groups), 40)
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(near.HASHES), 40, [None, pa.py_buffer(groups[group_of].copy())]
    )
    columns = {ORDER: np.full(40, 7, np.uint64), REST: np.arange(40, dtype=np.uint64)}
    table = pa.table({**columns, near.SIGNATURE: column})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "LARGEST_BUCKET", 10)
        found = []
        for size in (step, 40):
            match = near.Match("", [], 1, SIMILARITY)
            most = 0
            edges = []
            for a, b, _ in match._edges(table.slice(i, size) for i in range(0, 40, size)):
                most = max(most, len(a))
                edges += list(zip(a.tolist(), b.tolist(), strict=True))
            assert most < 10
            found.append(sorted(edges))
    assert found[0] == found[1]
    assert components(found[0]) == {
        int(i): int(np.flatnonzero(group_of == group_of[i])[0])
        for i in range(40)
        if i != np.flatnonzero(group_of == group_of[i])[0]
    }


# --- stars ---------------------------------------------------------------------------------------


def components(edges: list[tuple[int, int]]) -> dict[int, int]:
    """The smallest member of each number's component, but for itself, by union and find."""
    parent = {number: number for edge in edges for number in edge}

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {number: root(number) for number in parent if root(number) != number}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda e: e[0] != e[1])),
    st.integers(1, 60),
    st.integers(2, 5),
)
@example([(i, i + 1) for i in range(40)], 7, 2)  # a path
@example([(2**64 - 1, 2**63), (2**63, 0)], 1, 2)
def test_stars_are_the_connected_components(
    edges: list[tuple[int, int]], rows: int, fan_in: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in (("TASK_ROWS", rows), ("COLLECTED_ROWS", rows)):
            patch.setattr(near, name, value)
        patch.setattr(runs, "FAN_IN", fan_in)
        patch.setattr(runs, "MERGED_BATCH_BYTES", 48)
        made = Collector(folder, "match-00000", "", rows)
        for a, b in edges:
            made.add(near._table(*(np.array(pair, np.uint64) for pair in ((a, b), (b, a)))))
        found = rows_of(folder, near.contract(folder, made.close(), "testing"))
    assert dict(found) == components(edges)
    assert len(found) == len(dict(found))


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest table that is sorted or compared, for one corpus and one four times as large."""
    sizes = {"TASK_ROWS": 400, "COLLECTED_ROWS": 200, "LARGEST_BUCKET": 50}
    for name, value in sizes.items():
        monkeypatch.setattr(near, name, value)
    monkeypatch.setattr(runs, "FAN_IN", 4)
    monkeypatch.setattr(runs, "MERGED_BATCH_BYTES", 2000)
    most: list[int] = []
    for name in ("sort", "_batch"):
        real: Any = getattr(runs, name)

        def counted(table: pa.Table, real: Any = real) -> Any:
            most[-1] = max(most[-1], table.num_rows)
            return real(table)

        monkeypatch.setattr(runs, name, counted)
    compare = near.Match._compare

    def compared(self: near.Match, table: pa.Table) -> near.Edges:
        most[-1] = max(most[-1], table.num_rows)
        return compare(self, table)

    monkeypatch.setattr(near.Match, "_compare", compared)
    for count in (100, 400):
        most.append(0)
        texts = [f"{text} {i}" for i in range(count // 50) for text in some_texts(i, 50)]
        assert dropped_of(texts, files=4, rows=200)
    # What is collected, and a batch of each run: an edge has 16 bytes.
    bound = 200 + 4 * (2000 // 16 + 1)
    assert max(most) <= bound < 400 * (near.HASHES // near.rows_of_band(SIMILARITY)) // 10


def test_the_deleted_files_are_those_that_were_read(tmp_path: Path) -> None:
    texts = some_texts(5, 60)
    found = near.find(str(tmp_path), bands_of(texts, str(tmp_path), 3, 100), SIMILARITY)
    left = {file.name for file in (tmp_path / "work").glob("*.arrow")}
    assert left == {run["file"] for run in found.dropped}
