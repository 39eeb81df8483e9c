"""Preparing: each distinct document once, in an order that the texts decide, and the same bytes
whatever happened on the way.

Most tests run the two passes in this process, where the sizes that they set hold and any write can
be the last; some run them over Ray, and find the same bytes. MANTA_TEST_LONG=1: longer documents,
and a stop at every write instead of some.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta import layout, lock, storage
from manta.config import from_dict
from manta.data import manifest as manifests
from manta.data import mixture, prepare, shards, shuffle
from manta.data.manifest import Manifest
from manta.data.recipe import DataConfig, PrepareConfig
from manta.data.shuffle import SPLITS, Gather, Key, Scatter
from manta.errors import ConfigError, DataError
from manta.text import sources, tokenizer

IS_LONG = os.environ.get("MANTA_TEST_LONG") == "1"
VAL_FRACTION = 0.2
WORDS = ["ray", "manta", "sea", "é", "🐟", "\n", "<|endoftext|>", "1234", "  "]

few = settings(deadline=None, max_examples=50)


def set_sizes(
    patch: pytest.MonkeyPatch,
    part_bytes: int = 8000,
    run_bytes: int = 3000,
    batch_tokens: int = 300,
    shard_tokens: int = 3000,
) -> None:
    """Several parts, runs, batches and shards of a small corpus."""
    patch.setattr(sources, "PART_BYTES", part_bytes)
    patch.setattr(shuffle, "RUN_BYTES", run_bytes)
    patch.setattr(shuffle, "BATCH_TOKENS", batch_tokens)
    patch.setattr(prepare, "LEAST_SHARD_TOKENS", shard_tokens)
    patch.setattr(prepare, "ROW_GROUP_TOKENS", 512)


def in_this_process(task: Scatter | Gather, indexes: list[int]) -> Iterator[dict[str, Any]]:
    """What Ray Data does with a task."""
    for index in indexes:
        yield {key: values[0] for key, values in task({"index": np.array([index])}).items()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    set_sizes(monkeypatch)
    monkeypatch.setattr(prepare, "_over_ray", in_this_process)
    return monkeypatch


def silent(line: str) -> None:
    pass


def write_rows(folder: Path, files: list[list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        lines = "".join(json.dumps({"body": row}) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def config_of(source: Path, **keys: Any) -> PrepareConfig:
    defaults = {
        "source": str(source),
        "text_key": "body",
        "vocab_size": 280,
        "val_fraction": VAL_FRACTION,
        "name": "rows",
    }
    return from_dict(PrepareConfig, defaults | keys)


def content(folder: str | Path) -> dict[str, bytes]:
    """Every file of a dataset."""
    root = Path(folder)
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def tokens_of(manifest: Manifest, split: str) -> np.ndarray:
    """Read with nothing but pyarrow, from a local folder."""
    files = [pq.read_table(f"{manifest.path}/{s.file}")["tokens"] for s in manifest.split(split)]
    return np.concatenate([file.to_numpy() for file in files])


def texts_of(manifest: Manifest, split: str) -> list[str]:
    made = manifest.load_tokenizer()
    ids = tokens_of(manifest, split)
    assert ids[-1] == made.eot
    return [
        made.decode(piece[:-1].tolist())
        for piece in np.split(ids, np.flatnonzero(ids == made.eot)[:-1] + 1)
    ]


def all_texts(manifest: Manifest) -> list[str]:
    return [text for split in SPLITS for text in texts_of(manifest, split)]


def refusal(call: Callable[[], Any]) -> str:
    """The one line that a DataError says."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one dataset, over Ray -----------------------------------------------------------------------


def some_files() -> list[list[str]]:
    """Rows for some files, with documents that are empty and others that come more than once."""
    draw = random.Random(0)
    files = [
        [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 40))) + f" {file} {row}"
            for row in range(50)
        ]
        for file in range(6)
    ]
    files[1][10] = files[1][20] = files[1][0]  # in one run
    files[5][:5] = files[0][:5]  # far apart
    files[2][7], files[3][0], files[4][49] = "", " \n\t", "  "  # U+2003 is a space too
    return files


@pytest.fixture(scope="module")
def rows() -> list[str]:
    return [row for rows in some_files() for row in rows]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), some_files())


@pytest.fixture(scope="module")
def dataset(ray_session: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        home = str(tmp_path_factory.mktemp("home"))
        return prepare.prepare(config_of(source), home, silent)


def splits_of(rows: list[str]) -> dict[str, set[str]]:
    """The distinct documents of each split, by the digest of their text, worked out anew."""
    found: dict[str, set[str]] = {"train": set(), "val": set()}
    for row in rows:
        if row.strip():
            word = int.from_bytes(
                hashlib.blake2b(row.encode(), digest_size=24).digest()[:8], "little"
            )
            found["val" if word / 2**64 < VAL_FRACTION else "train"].add(row)
    return found


def test_the_shards_hold_each_distinct_document_once(dataset: Manifest, rows: list[str]) -> None:
    assert len(dataset.split("train")) > 3
    for split, expected in splits_of(rows).items():
        found = texts_of(dataset, split)
        assert len(found) == len(set(found)) > 30
        assert set(found) == expected


def test_the_manifest_says_what_is_in_the_shards(dataset: Manifest, rows: list[str]) -> None:
    assert manifests.load(dataset.path) == dataset
    manifests.check(dataset)
    shards.verify(dataset, full=True)
    made = dataset.load_tokenizer()
    assert (dataset.vocab_size, dataset.eot, dataset.dtype) == (280, made.eot, "uint16")
    assert dataset.row_group_tokens == 512
    lengths = {"documents": [0] * 40, "tokens": [0] * 40}
    for shard in dataset.shards:
        ids = pq.read_table(f"{dataset.path}/{shard.file}")["tokens"].to_numpy()
        ends = np.flatnonzero(ids == made.eot) + 1
        pieces = np.split(ids, ends)[:-1]
        assert (shard.tokens, shard.documents) == (len(ids), len(ends)) == (ends[-1], len(pieces))
        assert shard.max_token == ids.max()
        text = [made.decode(piece[:-1].tolist()) for piece in pieces]
        assert shard.text_bytes == sum(len(t.encode()) for t in text)
        for piece in pieces:
            power = len(piece).bit_length() - 1
            lengths["documents"][power] += 1
            lengths["tokens"][power] += len(piece)
    assert dataset.lengths == lengths
    count = len([row for row in rows if row.strip()])
    assert dataset.dropped == {
        "empty": len(rows) - count,
        "contaminated": 0,
        "duplicate": count - sum(len(texts) for texts in splits_of(rows).values()),
    }
    assert dataset.dropped["empty"] == 3
    assert dataset.dropped["duplicate"] == 7
    report = prepare.summary(dataset)
    assert "3 empty, 0 contaminated, 7 duplicate documents" in report
    assert f"{dataset.text_bytes('val'):,} bytes of text" in report


def test_nothing_else_is_in_the_folder(dataset: Manifest) -> None:
    named = {shard.file for shard in dataset.shards}
    others = {layout.MANIFEST, layout.ENCODING, layout.LENGTHS}
    assert set(content(dataset.path)) == named | others
    assert not (Path(dataset.path) / shuffle.WORK).exists()


def test_the_order_is_a_shuffle_that_the_texts_and_the_seed_decide(
    dataset: Manifest, rows: list[str], source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    place = {row: i for i, row in reversed(list(enumerate(rows)))}
    other = prepare.prepare(config_of(source, shuffle_seed=1), str(tmp_path), silent)
    for split in SPLITS:
        found, again = texts_of(dataset, split), texts_of(other, split)
        digests = [Key.digest(text.encode()) for text in found]
        order = Key.of(digests, seed=0).order
        assert (np.diff(order.astype(object)) > 0).all()
        assert sorted(found) == sorted(again)
        after = {text: i for i, text in enumerate(found)}
        for texts, places in ((found, place), (again, place), (again, after)):
            ranks = np.argsort(np.argsort([places[text] for text in texts]))
            correlation = np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]
            assert abs(correlation) < 4 / np.sqrt(len(ranks))


@few
@given(st.lists(st.text(), min_size=1), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_document_in_a_small_val_split_is_in_each_larger_one(
    texts: list[str], a: float, b: float
) -> None:
    small, large = sorted((a, b))
    digests = [Key.digest(text.encode()) for text in texts]
    for seed in (0, 7):  # the seed has no say in it
        key = Key.of(digests, seed)
        assert (key.is_val(large) | ~key.is_val(small)).all()
        assert np.array_equal(key.is_val(small), Key.of(digests, 3).is_val(small))
        assert not key.is_val(0.0).any()
        assert key.is_val(1.0).all()


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part_bytes", "run_bytes", "batch_tokens"),
    [(8000, 3000, 300), (1, 10**9, 1), (10**9, 700, 10**9), (10**9, 10**9, 50)],
)
def test_other_parts_runs_and_batches_give_the_same_bytes(
    part_bytes: int, run_bytes: int, batch_tokens: int,
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_sizes(here, part_bytes, run_bytes, batch_tokens)
    again = prepare.prepare(config_of(source), str(tmp_path), silent)
    assert content(again.path) == content(dataset.path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_same_documents_in_other_files_give_the_same_shards(
    kind: str, dataset: Manifest, rows: list[str], tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    others = draw.sample(rows, len(rows))
    folder = tmp_path / "others"
    folder.mkdir()
    for start in range(0, len(others), 70):
        piece = others[start : start + 70]
        file = folder / f"{draw.random()}{kind}"
        lines = "".join(json.dumps({"body": row}) + "\n" for row in piece).encode()
        if kind == ".parquet":
            pq.write_table(pa.table({"body": piece}), file, row_group_size=13)
        else:
            file.write_bytes(gzip.compress(lines) if kind == ".jsonl.gz" else lines)
    again = prepare.prepare(config_of(folder), str(tmp_path), silent)
    first, second = content(dataset.path), content(again.path)
    assert first.pop(layout.MANIFEST) != second.pop(layout.MANIFEST)
    assert first == second
    assert dataclasses.replace(again, path=dataset.path, recipe=dataset.recipe) == dataset


def test_more_documents_leave_the_others_in_their_split(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "more", [[f"another one, {i}" for i in range(40)]])
    for file in source.iterdir():
        shutil.copy(file, tmp_path / "more" / f"old-{file.name}")
    more = prepare.prepare(config_of(tmp_path / "more"), str(tmp_path), silent)
    for split in SPLITS:
        old = set(texts_of(dataset, split))
        assert {t for t in texts_of(more, split) if not t.startswith("another")} == old


# --- interrupted ---------------------------------------------------------------------------------


class Killed(BaseException):
    """As a SIGKILL: nobody catches it."""


@contextlib.contextmanager
def killed_at(write: int, named: bool) -> Iterator[None]:
    """Stops what is inside at a write, before or after the file has got its name."""
    take_name, count = storage._take_name, 0

    def counting(beside: str, inside: str) -> None:
        nonlocal count
        count += 1
        if count < write or named:
            take_name(beside, inside)
        if count == write:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(storage, "_take_name", counting)
        yield


def stopped_before_the_end(c: PrepareConfig, home: Path) -> Path:
    """The folder of a dataset that lacks its manifest only."""
    with pytest.MonkeyPatch.context() as patch:

        def save(self: Manifest) -> None:
            raise Killed

        patch.setattr(Manifest, "save", save)
        with pytest.raises(Killed):
            prepare.prepare(c, str(home), silent)
    return Path(c.folder(str(home)))


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != storage.UNFINISHED]
    return {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


@pytest.mark.parametrize("named", [False, True])
def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    named: bool, dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    folder = Path(c.folder(home))
    attempts = 0
    while prepare.find(c, home) is None:
        attempts += 1
        assert attempts < 30
        before = stamps(folder)
        done = {f for f in before if f.suffix == ".json"}
        for file in done:  # what a record speaks of is done too
            done = done | {f for f in before if f.name.startswith(f"{file.stem}-")}
            done = done | {f for f in before if f.name == f"{file.stem}.parquet"}
        with killed_at(attempts, named):
            prepare.prepare(c, home, silent)
        if (folder / shuffle.WORK).exists() or prepare.find(c, home) is None:
            after = stamps(folder)
            assert {f: before[f] for f in done} == {f: after[f] for f in done}
    assert attempts > 5
    prepare.prepare(c, home, silent)  # deletes `work` where the stop was after the manifest
    assert content(folder) == content(dataset.path)
    assert not (folder / shuffle.WORK).exists()


def test_stopped_at_any_write_it_ends_with_the_same_bytes(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    expected, c = content(dataset.path), config_of(source)
    lines: list[str] = []
    for write in range(1, 1000, 1 if IS_LONG else 20):
        for named in (False, True):
            home = str(tmp_path / f"{write}-{named}")
            with killed_at(write, named):
                prepare.prepare(c, home, silent)
                assert write > 40
                return  # so many writes are not needed
            is_committed = prepare.find(c, home) is not None
            lines.clear()
            prepare.prepare(c, home, lines.append)
            assert content(c.folder(home)) == expected
            shutil.rmtree(home)
            if write > 1 and not is_committed:  # the first one is the plan
                assert lines == [f"going on with the preparation of {c.folder(home)}"]


@pytest.fixture(scope="module")
def stopped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied: the folder of the dataset, with all but its manifest."""
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        patch.setattr(prepare, "_over_ray", in_this_process)
        return stopped_before_the_end(config_of(source), tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("seed", range(100 if IS_LONG else 6))
def test_whatever_is_missing_is_made_again(
    seed: int,
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    draw, folder = random.Random(seed), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)
    for record in sorted((folder / shuffle.WORK).glob("*-*.json")):
        if draw.random() < (0.1, 0.5, 0.9)[seed % 3]:
            record.unlink()
            runs = (folder / shuffle.WORK).glob(f"{record.stem}-*.arrow")
            for file in (*sorted(runs), folder / f"{record.stem}.parquet"):
                if file.exists() and draw.random() < 0.5:
                    file.unlink()
    for torn in ("train-00000.parquet", "work/part-00000-000-val.arrow", "MANIFEST.json"):
        (folder / f"{torn}.0123abcd{storage.UNFINISHED}").write_bytes(b"PAR1 half of it")
    prepare.prepare(config_of(source), str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def edit_the_corpus(folder: Path, c: PrepareConfig) -> PrepareConfig:
    with (folder / "rows" / "3.jsonl").open("a") as f:
        f.write('{"body": "one more"}\n')
    return c


def edit_the_examples(folder: Path, c: PrepareConfig) -> PrepareConfig:
    (folder / "examples.txt").write_text("ray manta\n\nmanta sea sea")
    return c


def change(**keys: Any) -> Callable[[Path, PrepareConfig], PrepareConfig]:
    return lambda folder, c: dataclasses.replace(c, **keys)


@pytest.mark.parametrize(
    "edit",
    [
        edit_the_corpus,
        edit_the_examples,
        change(shuffle_seed=5),
        change(vocab_size=270),
        change(decontaminate_ngram=2),
    ],
)
def test_another_corpus_or_config_starts_over_and_says_so(
    edit: Callable[[Path, PrepareConfig], PrepareConfig],
    source: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(source, tmp_path / "rows")
    (tmp_path / "examples.txt").write_text("ray manta sea")
    c = config_of(
        tmp_path / "rows",
        decontaminate=[str(tmp_path / "examples.txt")],
        decontaminate_ngram=3,
    )
    first = stopped_before_the_end(c, tmp_path / "home")
    before = content(first)
    c = edit(tmp_path, c)
    lines: list[str] = []
    again = prepare.prepare(c, str(tmp_path / "home"), lines.append)
    assert lines == [f"preparing {first} from the start: the corpus or the config has changed"]
    fresh = prepare.prepare(c, str(tmp_path / "fresh"), silent)
    assert content(again.path) == content(fresh.path)
    assert any(before.get(shard.file) != content(fresh.path)[shard.file] for shard in fresh.shards)


def test_stopped_while_it_clears_the_folder_for_another_corpus(
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """And then the first config again: what its records speak of may be gone."""
    c, folder = config_of(source), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)

    def half(path: str) -> None:
        next(Path(path).glob("train-*.parquet")).unlink()
        raise Killed

    with here.context() as patch:
        patch.setattr(storage, "delete_folder", half)
        with pytest.raises(Killed):
            prepare.prepare(dataclasses.replace(c, shuffle_seed=1), str(tmp_path), silent)
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def test_stopped_just_after_its_commit_it_leaves_nothing_to_the_next_job(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    mixed = from_dict(DataConfig, dataclasses.asdict(c))
    work = Path(c.folder(home)) / shuffle.WORK

    def stop(path: str) -> None:
        if path == str(work):
            raise Killed

    with here.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "delete_folder", stop)
        prepare.prepare(c, home, silent)
    assert work.exists()
    with lock.lock(f"{home}/data/.rows.lock", "preparing it"):  # whoever is at it deletes it
        mixture.open_datasets(mixed, home, silent)
    assert work.exists()
    (found,) = mixture.open_datasets(mixed, home, silent)
    assert content(c.folder(home)) == content(dataset.path)
    assert found.sha256 == dataset.sha256


def test_files_of_something_else_are_cleared(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c = config_of(source)
    folder = Path(c.folder(str(tmp_path)))
    folder.mkdir(parents=True)
    for name in ("train-00000.parquet", "train-99999.parquet", "val-00000.parquet.tmp"):
        (folder / name).write_bytes(b"half a shard")
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def test_after_an_error_over_ray_the_rest_is_kept_and_the_next_run_goes_on(
    dataset: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch)
    c = config_of(source)
    folder = Path(c.folder(str(tmp_path)))
    with killed_at(2, named=True):  # the plan and the tokenizer
        prepare.prepare(c, str(tmp_path), silent)
    # A folder where a file should go: its worker meets an error of the operating system.
    in_the_way = folder / shuffle.WORK / "part-00001-000-train.arrow"
    in_the_way.mkdir()
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{folder}: cannot be written (Is a directory)")
    assert said.endswith(shuffle.RESUME)
    assert prepare.find(c, str(tmp_path)) is None
    in_the_way.rmdir()
    lines: list[str] = []
    prepare.prepare(c, str(tmp_path), lines.append)
    assert lines == [f"going on with the preparation of {folder}"]
    assert content(folder) == content(dataset.path)


# --- both passes, by property --------------------------------------------------------------------

# Where ranges of hashes begin and end, for up to seven shards, and around it.
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
    """The documents of a run whose texts have these hashes, which no text could be found for."""

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


@settings(deadline=None, max_examples=300 if IS_LONG else 60)
@given(
    runs=runs_of_documents,
    split=st.sampled_from(SPLITS),
    count=st.integers(1, 7),
    batch_tokens=st.integers(1, 60),
    seed=st.integers(0, 3),
)
@example([[(2**63, 0)] * 5 + [(2**63 - 1, 1)] * 5, [(2**63, 1)]], "train", 2, 5, 0)
@example([[(0, 0), (2**64 - 1, 0)]], "val", 7, 50, 0)  # shards in the middle get nothing
def test_the_shards_are_the_distinct_documents_in_order_whatever_the_hashes(
    runs: list[list[Document]], split: str, count: int, batch_tokens: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "mix_bits", lambda words: words)
        start = int(Key.of([bytes(24)], seed).order[0])  # taken back, so that hashes are as given
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
    """A run ends with the document that fills it, and its batches with the one that fills them."""
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
                # One document more than fits, at one byte a token, and its end-of-text.
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


# --- odd documents -------------------------------------------------------------------------------

LETTERS = 50 << 20 if IS_LONG else 200_000
LONG_TEXT = 50 << 20 if IS_LONG else 5 << 20


def long_text() -> str:
    """Words that are not all the same, quickly."""
    numbers = np.random.default_rng(0).integers(0, 10**6, LONG_TEXT // 7)
    return " ".join(map(str, numbers.tolist()))


def test_odd_documents_come_back_as_they_were(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    set_sizes(here, run_bytes=1 << 20, shard_tokens=1 << 19)
    here.setattr(prepare, "TOKENIZER_SAMPLE_BYTES", 100_000)  # all but the last one
    odd = [
        "",
        " \n\t　",
        "\x00",
        "\x00\x00 NUL \x00 bytes",
        "<|endoftext|>",
        "a <|endoftext|> b<|endoftext|>",
        "<|endoftext|>" * 500,
        "🐟🐠👩‍👩‍👧‍👦 e\u0301 \ufffd \ufeff \u2028",
        "\r\n windows \r\n",
        "no newline at the end",
        " white space around it\n\n",
        "x",
        "a" * LETTERS,
        "🐟" * 10_000,
        "-" * 10_000,
        "\n" * 10_000 + "x",
        long_text(),
    ]
    filler = [f"{i}" for i in range(60)]
    folder = write_rows(tmp_path / "odd", [odd, filler])
    made = prepare.prepare(config_of(folder), str(tmp_path), silent)
    expected = [text for text in [*odd, *filler] if text.strip()]
    # Compared by digest: a difference in 5 MB is nothing to print.
    digests = sorted(Key.digest(text.encode()) for text in all_texts(made))
    assert digests == sorted(Key.digest(text.encode()) for text in expected)
    assert made.dropped == {"empty": 2, "contaminated": 0, "duplicate": 0}
    ends = sum(int((tokens_of(made, split) == made.eot).sum()) for split in SPLITS)
    assert ends == len(expected)
    assert sum(made.text_bytes(split) for split in SPLITS) == sum(len(t.encode()) for t in expected)
    shards.verify(made, full=True)


def test_one_document_far_longer_than_a_shard(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    """Some ranges of hashes then hold nothing, and give no shard."""
    texts = ["long " * 80_000, *(f"short {i}" for i in range(20))]
    c = config_of(write_rows(tmp_path / "rows", [texts]))
    made = prepare.prepare(c, str(tmp_path), silent)
    assert sorted(all_texts(made)) == sorted(texts)
    assert prepare._shards_for(made.tokens("train")) > 21 > len(made.split("train"))


# --- decontamination -----------------------------------------------------------------------------


def test_documents_that_share_n_words_with_an_example_are_dropped_and_counted(
    source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    example_words = "how many rays of light reach the bottom of the sea"
    copies = [
        f"It asks: HOW many, rays of light! {i}" for i in range(5)
    ]  # five words in a row, set otherwise
    near = [f"how many rays of lights {i}" for i in range(40)]
    rows = write_rows(tmp_path / "rows", [near[:20] + copies[:2], near[20:] + copies[2:]])
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"question": example_words}) + "\n")
    plain = config_of(rows, name="plain")
    clean = config_of(rows, name="clean", decontaminate=[str(examples)], decontaminate_ngram=5)
    home = str(tmp_path / "home")
    assert sorted(all_texts(prepare.prepare(plain, home, silent))) == sorted(near + copies)
    made = prepare.prepare(clean, home, silent)
    assert sorted(all_texts(made)) == sorted(near)
    assert made.dropped == {"empty": 0, "contaminated": 5, "duplicate": 0}
    assert made.recipe != plain.recipe()
    said = refusal(lambda: prepare.find(dataclasses.replace(plain, name="clean"), home))
    assert "decontaminate=" in said and str(examples) in said
    other = dataclasses.replace(clean, decontaminate_ngram=6)
    said = refusal(lambda: prepare.find(other, home))
    assert "decontaminate_ngram=5, but the config says 6" in said


# --- what cannot be prepared ---------------------------------------------------------------------


def test_a_missing_corpus_leaves_what_is_there_alone(tmp_path: Path) -> None:
    c = config_of(tmp_path / "none", name="here")
    folder = Path(c.folder(str(tmp_path)))
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said == f"data.source={tmp_path / 'none'}: no such file or folder"
    assert (folder / "file").exists()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "the corpus holds no text"),
        (["", " \n"], "the corpus holds no text"),
        (["one document"] * 3, "none of its 1 documents fell into the val split (dropped: 2 dup"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_corpus_without_text_for_both_splits_is_refused(
    trained: bool, texts: list[str], words: str, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"val_fraction": 0.01}
    if not trained:
        (tmp_path / "encoding.json").write_bytes(tokenizer.train(["a b"], 260).serialized)
        keys |= {"tokenizer": str(tmp_path / "encoding.json"), "vocab_size": None}
    c = config_of(write_rows(tmp_path / "rows", [texts]), **keys)
    home = str(tmp_path / "home")
    assert words in refusal(lambda: prepare.prepare(c, home, silent))
    assert prepare.find(c, home) is None
    # With more text, the same config starts over.
    write_rows(tmp_path / "rows", [texts, [f"text {i}" for i in range(1000)]])
    assert prepare.prepare(c, home, silent).documents("val") > 0


def test_bytes_that_are_not_utf8_are_named_over_ray_or_replaced(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, part_bytes=300)
    # The sample for the tokenizer ends before the bad file: a worker meets it.
    monkeypatch.setattr(prepare, "TOKENIZER_SAMPLE_BYTES", 300)
    folder, home = tmp_path / "texts", str(tmp_path / "home")
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text("\n\n".join(f"good text {i} {n}" for n in range(30)))
    (folder / "3.txt").write_bytes(b"good text\n\nbad \xff text")
    c = config_of(folder, document_bytes=8)
    said = refusal(lambda: prepare.prepare(c, home, silent))
    assert said.startswith(f"{folder}/3.txt: not UTF-8 at byte 15 (0xff)")
    assert "data.errors=replace" in said
    assert prepare.find(c, home) is None
    assert not (Path(c.folder(home)) / layout.MANIFEST).exists()
    mended = prepare.prepare(dataclasses.replace(c, errors="replace"), home, silent)
    texts = [text.strip() for text in all_texts(mended)]
    expected = [f"good text {i} {n}" for i in (0, 1, 2, 4) for n in range(30)]
    assert sorted(texts) == sorted([*expected, "good text", "bad \ufffd text"])


def test_a_val_split_that_is_given_apart_is_all_of_it(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    both = [f"in both {n}" for n in range(5)]
    train = [f"to train on {n}" for n in range(60)]
    val = [f"to measure on {n}" for n in range(20)]
    write_rows(tmp_path / "train", [train[:30], train[30:] + both])
    write_rows(tmp_path / "val", [val, both])
    c = from_dict(
        PrepareConfig,
        {
            "source": str(tmp_path / "train"),
            "val_source": str(tmp_path / "val"),
            "text_key": "body",
            "vocab_size": 280,
            "name": "apart",
        },
    )
    found = prepare.prepare(c, str(tmp_path), silent)
    assert sorted(texts_of(found, "train")) == sorted(train + both)
    assert sorted(texts_of(found, "val")) == sorted(val + both)
    assert found.recipe["val_source"] != found.recipe["source"]
    said = refusal(lambda: prepare.find(dataclasses.replace(c, val_source=None), str(tmp_path)))
    assert "val_" in said
    with pytest.raises(ConfigError, match="with val_source omit it"):
        from_dict(PrepareConfig, {"val_source": "x", "val_fraction": 0.1})


def test_a_dataset_of_that_name_from_another_recipe_is_refused(
    dataset: Manifest, source: Path, tmp_path: Path
) -> None:
    home = dataset.path.rpartition("/data/")[0]
    c = config_of(source)
    before = content(dataset.path)
    assert prepare.find(c, home) == prepare.prepare(c, home, silent) == dataset
    changes: dict[str, Any] = {
        "val_fraction=0.2, but the config says 0.3; ": {"val_fraction": 0.3},
        "source.errors=strict, but the config says replace; ": {"errors": "replace"},
        "shuffle_seed=0, but the config says 1; ": {"shuffle_seed": 1},
        "vocab_size=280, but the config says 4096; ": {"vocab_size": None},
        f"source.location={source}, but the config says {tmp_path}; ": {"source": str(tmp_path)},
    }
    for words, keys in changes.items():
        other = dataclasses.replace(c, **keys)
        said = refusal(lambda c=other: prepare.find(c, home))  # type: ignore[misc]
        assert said.startswith(f"{dataset.path} was prepared with {words}")
        assert "give another data.name" in said
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    refusal(lambda: prepare.prepare(other, home, silent))
    assert content(dataset.path) == before
    assert prepare.find(dataclasses.replace(c, name="elsewhere"), home) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "no such file"),
        (b"", "not a tokenizer of Manta's"),
        (b"{", "not a tokenizer of Manta's"),
        (b"[]", "not a tokenizer of Manta's"),
        (b"\xff\xfe", "not a tokenizer of Manta's"),
        (b'{"format": "other"}', "not a tokenizer of Manta's"),
        (b'{"format": "manta-bpe-1", "tokens": ["?"]}', "not a tokenizer of Manta's"),
    ],
)
def test_a_bad_tokenizer_file_is_named(
    data: bytes | None, words: str, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    if data is not None:
        file.write_bytes(data)
    c = config_of(source, tokenizer=str(file), vocab_size=None)
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{file}: {words}")
    if data is not None:
        return
    file.write_bytes(tokenizer.train(["ray manta"], 260).serialized)
    made = prepare.prepare(c, str(tmp_path), silent)
    assert made.tokenizer_sha256 == tokenizer.load(str(file)).sha256


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_run_that_is_gone_or_torn_is_named_with_the_remedy(
    size: int | None,
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    c, folder = config_of(source), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)
    for record in (folder / shuffle.WORK).glob("train-*.json"):
        record.unlink()
    file = max((folder / shuffle.WORK).glob("*-train.arrow"))
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{file}: cannot be read (")
    assert f"delete {folder / shuffle.WORK} and run the same command again" in said
    shutil.rmtree(folder / shuffle.WORK)
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


# --- a full disk ---------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_is_one_line_and_the_next_run_goes_on(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    expected, c = content(dataset.path), config_of(source)
    folder = Path(c.folder(str(tmp_path)))
    largest = max(map(len, expected.values()))
    refused = 0
    # From a limit that stops the very first file on, up to one that only stops the last.
    for size in [10, 500, *range(1000, largest, 1500)]:
        with largest_file(size):
            try:
                prepare.prepare(c, str(tmp_path), silent)
                break
            except DataError as e:
                refused += 1
                check_cannot_be_written(e, str(folder), "File too large")
        assert not (folder / layout.MANIFEST).exists()
    assert refused > 5
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == expected


def check_cannot_be_written(error: DataError, folder: str, reason: str) -> None:
    """One line that names the folder and the kernel's reason, and says what to do."""
    assert str(error).startswith(f"{folder}: cannot be written (")
    assert reason in str(error)
    assert str(error).endswith(f"; {shuffle.RESUME}") and "\n" not in str(error)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A filesystem in memory of so many bytes, or that is made as large."""
    where = tmp_path / "disk"
    where.mkdir()

    def resize(size: int, first: bool = False) -> Path:
        options = f"size={size}" if first else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if first and done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return where

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    resize(4096, first=True)
    yield resize
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    dataset: Manifest,
    source: Path,
    small_disk: Callable[[int], Path],
    here: pytest.MonkeyPatch,
) -> None:
    """The disk grows a little at a time, so that it is full at every kind of file in turn."""
    c, page = config_of(source), resource.getpagesize()
    home = small_disk(page)
    (home / "filler").write_bytes(bytes(page))
    refused = 0
    for pages in range(1, 400, 5):
        small_disk(pages * page)
        try:
            prepare.prepare(c, str(home), silent)
            break
        except DataError as e:
            refused += 1
            check_cannot_be_written(e, c.folder(str(home)), "No space left on device")
        assert not (Path(c.folder(str(home))) / layout.MANIFEST).exists()
    assert refused > 10
    assert content(c.folder(str(home))) == content(dataset.path)


# --- several at once, and far away ---------------------------------------------------------------


def test_of_two_at_once_one_prepares_and_the_other_is_told_who(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    started, may_go_on = threading.Event(), threading.Event()

    def slow(task: Scatter | Gather, indexes: list[int]) -> Iterable[dict[str, Any]]:
        started.set()
        assert may_go_on.wait(60)
        return in_this_process(task, indexes)

    here.setattr(prepare, "_over_ray", slow)
    first = threading.Thread(target=prepare.prepare, args=(c, home, silent))
    first.start()
    assert started.wait(60)
    try:
        said = refusal(lambda: prepare.prepare(c, home, silent))
        assert said.startswith(f"preparing {c.folder(home)}: process {os.getpid()} on ")
        assert "wait until it has ended" in said
    finally:
        may_go_on.set()
        first.join()
    assert prepare.prepare(c, home, silent) == prepare.find(c, home)
    assert content(c.folder(home)) == content(dataset.path)


def test_of_many_at_once_the_dataset_is_whole(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """Whoever is refused tries again, so that the end of one meets the start of others."""
    c, home = config_of(source), str(tmp_path)
    found: list[Manifest] = []
    others: list[BaseException] = []

    def persistent() -> None:
        while True:
            try:
                found.append(prepare.prepare(c, home, silent))
                return
            except DataError as e:
                if "wait until it has ended" not in str(e):
                    others.append(e)
                    return
            except BaseException as e:
                others.append(e)
                return
            threading.Event().wait(0.01)

    threads = [threading.Thread(target=persistent) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert others == []
    assert {manifest.sha256 for manifest in found} == {dataset.sha256}
    assert len(found) == 4
    assert content(c.folder(home)) == content(dataset.path)


def test_a_home_in_an_object_store_gets_the_same_bytes(
    dataset: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's local:// stands for one: Manta treats it as it does s3://, nothing in place."""
    set_sizes(monkeypatch)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)
    c, home = config_of(source), f"local://{tmp_path / 'bucket'}"
    folder = tmp_path / "bucket" / "data" / "rows"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "gather", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(c, home, silent)
    lines: list[str] = []
    with monkeypatch.context() as patch:  # nothing is left to do for the first pass
        patch.setattr(Scatter, "run", lambda *arguments: 1 / 0)
        made = prepare.prepare(c, home, lines.append)
    assert lines == [f"going on with the preparation of {home}/data/rows"]
    assert made.path == f"{home}/data/rows"
    assert manifests.load(made.path) == made
    assert content(folder) == content(dataset.path)
    assert not (folder / shuffle.WORK).exists()
    assert [f.name for f in (tmp_path / "bucket" / "data").iterdir()] == ["rows"]  # and no lease
