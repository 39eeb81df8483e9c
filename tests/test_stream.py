"""From documents to batches: the order by property, the shards and the stream over Ray for real."""

import dataclasses
import itertools
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manta import cluster
from manta.config import from_dict
from manta.data import manifest as manifests
from manta.data import order as orders
from manta.data import prepare, stream
from manta.data.manifest import Manifest, Shard
from manta.data.order import Order
from manta.data.prepare import DataConfig
from manta.errors import DataError
from manta.text import sources, tokenizer

few = settings(deadline=None, max_examples=25)

# --- the order -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """An order, the size that its windows are to have, and how many workers share it."""

    order: Order
    window_tokens: int
    world_size: int

    def batches(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """What a worker reads of batches [start, stop): (N, seq_len + 1, 2) tokens, each told
        apart as (row group, place in it)."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orders, "WINDOW_TOKENS", self.window_tokens)
            share = self.order.sequences_per_batch // world_size
            found = []
            for batch in range(start, stop):
                window, first = self.order.window_of(batch)
                rows = sequences_of(line_of(self.order, window), self.order.seq_len)
                places = self.order.sequences(window, first, rank, world_size)
                found.append(rows[places[:share]])
            return np.concatenate(found)

    @property
    def window_batches(self) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orders, "WINDOW_TOKENS", self.window_tokens)
            return self.order.window_batches


def line_of(order: Order, window: int) -> np.ndarray:
    segments = order.segments(window)
    return np.array([(s.row_group, i) for s in segments for i in range(s.start, s.stop)])


def sequences_of(line: np.ndarray, seq_len: int) -> np.ndarray:
    count = (len(line) - 1) // seq_len
    return np.stack([line[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    row_groups = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=8)))
    world_size, seq_len = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    per_batch = world_size * draw(st.integers(1, 3))
    assume(sum(row_groups) > per_batch * seq_len)
    order = Order(row_groups, draw(st.integers(0, 2**40)), seq_len, per_batch)
    return Case(order, draw(st.integers(1, 200)), world_size)


def tokens_of(row_groups: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(group, i) for group, size in enumerate(row_groups) for i in range(size)]


@few
@given(cases())
def test_each_token_of_an_epoch_is_an_input_exactly_once(case: Case) -> None:
    order = case.order
    windows = 1 + 2 * order.total_tokens // (case.window_batches * order.batch_tokens)
    batches = windows * case.window_batches
    inputs = case.batches(0, batches)[:, :-1].reshape(-1, 2)
    seen = Counter(map(tuple, inputs.tolist()))
    # So many whole epochs have been read, and of the next one the start of its line.
    epochs, rest = divmod(batches * order.batch_tokens, order.total_tokens)
    assert epochs >= 2
    again = {token for token, count in seen.items() if count == epochs + 1}
    assert len(again) == rest
    assert seen == Counter({t: epochs + (t in again) for t in tokens_of(order.row_groups)})


@few
@given(cases())
def test_the_line_of_tokens_is_each_epoch_in_one_piece(case: Case) -> None:
    order = case.order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW_TOKENS", case.window_tokens)
        windows = 1 + 2 * order.total_tokens // (order.window_batches * order.batch_tokens)
        lines = [line_of(order, window) for window in range(windows + 1)]
    for line, following in itertools.pairwise(lines):  # the last target is the next first input
        assert line[-1].tolist() == following[0].tolist()
    whole = [tuple(token) for line in lines for token in line[:-1].tolist()]
    for epoch in range(2):
        tokens = whole[epoch * order.total_tokens : (epoch + 1) * order.total_tokens]
        assert sorted(tokens) == tokens_of(order.row_groups)
        groups = [group for group, _ in itertools.groupby(tokens, key=lambda token: token[0])]
        assert len(groups) == len(order.row_groups)  # each row group is read from start to end


@few
@given(cases())
def test_a_sequence_is_neighbours_and_its_targets_are_the_next_tokens(case: Case) -> None:
    rows = case.batches(0, case.window_batches)
    assert rows.shape[1:] == (case.order.seq_len + 1, 2)
    ends = {(g, size - 1) for g, size in enumerate(case.order.row_groups)}
    for a, b in zip(rows[:, :-1].reshape(-1, 2), rows[:, 1:].reshape(-1, 2), strict=True):
        assert tuple(b - a) == (0, 1) or (tuple(a) in ends and b[1] == 0)


@few
@given(cases(), st.integers(0, 50))
def test_any_split_over_workers_gives_the_same_global_batch(case: Case, batch: int) -> None:
    whole = case.batches(batch, batch + 1)
    shares = [
        case.batches(batch, batch + 1, rank, case.world_size) for rank in range(case.world_size)
    ]
    assert {len(share) for share in shares} == {len(whole) // case.world_size}
    assert np.array_equal(np.concatenate(shares), whole)


@few
@given(cases(), st.integers(0, 30))
def test_starting_at_a_batch_drops_exactly_those_before_it(case: Case, start: int) -> None:
    order = case.order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW_TOKENS", case.window_tokens)
        window, first = order.window_of(start)
        assert window * order.window_batches + first == start
        for rank in range(case.world_size):
            whole = order.sequences(window, 0, rank, case.world_size)
            share = order.sequences_per_batch // case.world_size
            later = order.sequences(window, first, rank, case.world_size)
            assert np.array_equal(later, whole[first * share :])


@few
@given(cases())
def test_a_window_is_each_of_its_sequences_once(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW_TOKENS", case.window_tokens)
        for window in range(3):
            ranks = range(case.world_size)
            places = [case.order.sequences(window, 0, r, case.world_size) for r in ranks]
            count = case.order.window_batches * case.order.sequences_per_batch
            assert np.array_equal(np.sort(np.concatenate(places)), np.arange(count))


def test_epochs_windows_and_seeds_differ_and_the_same_seed_does_not() -> None:
    groups = (50,) * 30
    order = Order(groups, 1, 5, 10)
    batches = order.window_batches
    line, later, again = (line_of(o, w).tolist() for o, w in ((order, 0), (order, 1), (order, 0)))
    assert line == again
    assert line != later
    assert line != line_of(Order(groups, 2, 5, 10), 0).tolist()
    shuffles = [o.sequences(w, 0, 0, 1) for o, w in ((order, 0), (order, 1))]
    shuffles += [Order(groups, 2, 5, 10).sequences(0, 0, 0, 1)]
    for a, b in itertools.combinations(shuffles, 2):
        assert not np.array_equal(a, b)
        assert not np.array_equal(a, np.arange(10 * batches))
    # an epoch has its own order of row groups too
    assert line[: order.total_tokens] != line_of(order, 1)[: order.total_tokens].tolist()


def test_a_corpus_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 1,000 tokens, fewer than one batch of 1,000 "):
        Order((500, 500), 0, 100, 10)
    assert Order((500, 501), 0, 100, 10).window_batches == 1


# --- the manifest --------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    """A manifest saved with its tokenizer and two files of bytes as shards."""
    made = tokenizer.train(["some text"], 260)
    (tmp_path / tokenizer.FILE_NAME).write_bytes(made.serialized)
    shards = []
    for split in ("train", "val"):
        data = split.encode() * 100
        name = f"{split}-00000.parquet"
        (tmp_path / name).write_bytes(data)
        digest = manifests.storage.sha256_of(data)
        shards.append(Shard(name, split, 2, 30, 100, [10, 20], len(data), digest))  # type: ignore[arg-type]
    recipe = {"source": {"location": "/ü", "subset": None}, "val_fraction": 0.05}
    manifest = Manifest(
        str(tmp_path), recipe, made.name, made.sha256, made.vocab_size, made.eot, tuple(shards)
    )
    manifest.save()
    return manifest


def test_a_manifest_comes_back_equal(small: Manifest) -> None:
    back = manifests.load(small.path)
    assert back == small
    assert (back.tokens("train"), back.rows("val"), back.text_bytes("val")) == (30, 2, 100)
    manifests.verify(back, hashes=True)
    assert back.load_tokenizer().sha256 == small.tokenizer_sha256


def test_without_a_manifest_there_is_no_dataset(small: Manifest) -> None:
    assert manifests.exists(small.path)
    (Path(small.path) / manifests.FILE_NAME).unlink()
    assert not manifests.exists(small.path)
    with pytest.raises(DataError, match=r"MANIFEST\.json: no such file"):
        manifests.load(small.path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"format": "other"}', '{"format": "manta-data-1"}']
)
def test_a_damaged_manifest_is_named(content: str, small: Manifest) -> None:
    (Path(small.path) / manifests.FILE_NAME).write_text(content)
    with pytest.raises(DataError, match=r"MANIFEST\.json: "):
        manifests.load(small.path)


def test_truncated_changed_and_missing_shards_are_all_named(small: Manifest) -> None:
    train, val = (Path(small.path) / shard.file for shard in small.shards)
    train.write_bytes(train.read_bytes()[:-1])
    changed = bytearray(val.read_bytes())
    changed[7] ^= 1
    val.write_bytes(changed)
    with pytest.raises(DataError) as caught:
        manifests.verify(small, hashes=True)
    assert f"{train}: 499 bytes, but its manifest says 500: it is truncated" in str(caught.value)
    assert f"{val}: its sha256 differs" in str(caught.value)
    assert f"delete {small.path}" in str(caught.value)

    with pytest.raises(DataError) as caught:
        manifests.verify(small, hashes=False)
    assert str(val) not in str(caught.value)
    train.unlink()
    with pytest.raises(DataError) as caught:
        manifests.verify(small, hashes=False)
    assert f"{train}: the file is missing" in str(caught.value)


def test_a_missing_or_another_tokenizer_is_named(small: Manifest) -> None:
    file = Path(small.path) / tokenizer.FILE_NAME
    file.write_bytes(tokenizer.train(["other text"], 265).serialized)
    with pytest.raises(DataError, match=r"encoding\.json: not the tokenizer that this dataset"):
        small.load_tokenizer()
    file.unlink()
    with pytest.raises(DataError, match=r"encoding\.json: no such file"):
        small.load_tokenizer()


# --- which split ---------------------------------------------------------------------------------


@few
@given(st.text(), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_document_in_a_small_val_split_is_in_each_larger_one(
    text: str, a: float, b: float
) -> None:
    small, large = sorted((a, b))
    assert prepare.is_val(text, large) or not prepare.is_val(text, small)
    assert not prepare.is_val(text, 0.0)
    assert prepare.is_val(text, 1.0)


def test_the_val_split_has_about_its_share() -> None:
    for fraction in (0.05, 0.5):
        share = np.mean([prepare.is_val(f"document {i}", fraction) for i in range(10_000)])
        assert abs(share - fraction) < 0.015


# --- preparing -----------------------------------------------------------------------------------

VAL_FRACTION = 0.2
SEQ_LEN = 64


def some_documents() -> list[list[str]]:
    """Rows for some files; the last one's fill several row groups of a shard."""
    draw = random.Random(0)
    words = ["ray", "manta", "sea", "é", "🐟", "\n", "<|endoftext|>", "1234", "  "]
    small = [
        [
            " ".join(draw.choices(words, k=draw.randint(1, 40))) + f" {file} {row}"
            for row in range(60)
        ]
        for file in range(6)
    ]
    large = [draw.randbytes(4000).hex() for _ in range(90)]
    return [*small, large]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset prepared over Ray, and the documents in it."""

    config: DataConfig
    home: str
    manifest: Manifest
    documents: list[str]

    def split(self, split: str) -> list[np.ndarray]:
        """The tokens of each row group of a split, read with nothing but pyarrow."""
        return [
            np.concatenate([np.array(row) for row in file.read_row_group(i)["tokens"].to_pylist()])
            for shard in self.manifest.split(split)
            for file in [pq.ParquetFile(f"{self.manifest.path}/{shard.file}")]
            for i in range(file.num_row_groups)
        ]


@pytest.fixture(scope="module")
def dataset(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    corpus, home = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("home")
    files = some_documents()
    for number, rows in enumerate(files):
        lines = "".join(json.dumps({"body": row}) + "\n" for row in rows)
        (corpus / f"{number}.jsonl").write_text(lines)
    config = from_dict(
        DataConfig,
        {
            "source": str(corpus),
            "text_key": "body",
            "vocab_size": 280,
            "val_fraction": VAL_FRACTION,
            "name": "rows",
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", 6000)  # about a file a part
        manifest = prepare.prepare(config, str(home))
    return Prepared(config, str(home), manifest, [row for rows in files for row in rows])


def test_the_tokens_are_the_documents_each_followed_by_end_of_text(dataset: Prepared) -> None:
    made = dataset.manifest.load_tokenizer()
    assert len(dataset.manifest.split("train")) > 3
    assert max(len(shard.row_groups) for shard in dataset.manifest.shards) > 1
    for split in ("train", "val"):
        expected = [
            text
            for text in dataset.documents
            if prepare.is_val(text, VAL_FRACTION) == (split == "val")
        ]
        found = []
        for shard in dataset.manifest.split(split):
            for row in pq.read_table(f"{dataset.manifest.path}/{shard.file}").to_pylist():
                assert row["tokens"][-1] == made.eot
                assert made.eot not in row["tokens"][:-1]
                found.append(made.decode(row["tokens"][:-1]))
                assert row["text_bytes"] == len(found[-1].encode())
        assert found == expected
        assert dataset.manifest.rows(split) == len(expected)
        assert dataset.manifest.text_bytes(split) == sum(len(t.encode()) for t in expected)


def test_the_splits_are_disjoint_and_val_has_about_its_share(dataset: Prepared) -> None:
    rows = dataset.manifest.rows("val")
    assert abs(rows / len(dataset.documents) - VAL_FRACTION) < 0.05


def test_the_manifest_says_what_is_in_the_shards(dataset: Prepared) -> None:
    manifest = dataset.manifest
    assert manifests.load(manifest.path) == manifest
    manifests.verify(manifest, hashes=True)
    for split in ("train", "val"):
        groups = [n for shard in manifest.split(split) for n in shard.row_groups]
        assert groups == [len(tokens) for tokens in dataset.split(split)]
        assert manifest.tokens(split) == sum(groups)
    names = {shard.file for shard in manifest.shards}
    folder = {file.name for file in Path(manifest.path).iterdir()}
    assert folder == names | {manifests.FILE_NAME, tokenizer.FILE_NAME}


def test_preparing_again_gives_the_same_bytes_whatever_was_left_there(
    dataset: Prepared, tmp_path: Path
) -> None:
    left = Path(dataset.config.folder(str(tmp_path)))
    left.mkdir(parents=True)
    for name in ("train-00000.parquet", "train-99999.parquet", "val-00000.parquet.tmp"):
        (left / name).write_bytes(b"half a shard")
    assert prepare.find(dataset.config, str(tmp_path)) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", 6000)
        again = prepare.prepare(dataset.config, str(tmp_path))
    assert dataclasses.replace(again, path=dataset.manifest.path) == dataset.manifest
    first, second = (
        {file.name: file.read_bytes() for file in Path(manifest.path).iterdir()}
        for manifest in (dataset.manifest, again)
    )
    assert first == second


def test_a_prepared_dataset_is_found_and_another_recipe_refused(dataset: Prepared) -> None:
    assert prepare.find(dataset.config, dataset.home) == dataset.manifest
    other = dataclasses.replace(dataset.config, val_fraction=0.3)
    with pytest.raises(DataError, match=r"with val_fraction=0\.2, but the config says 0\.3; "):
        prepare.find(other, dataset.home)
    other = dataclasses.replace(dataset.config, errors="replace")
    with pytest.raises(DataError, match=r"with source\.errors=strict, but .* says replace; "):
        prepare.find(other, dataset.home)
    other = dataclasses.replace(dataset.config, tokenizer="/a/encoding.json", vocab_size=None)
    with pytest.raises(DataError, match=r"with tokenizer=bpe, but .* says /a/encoding\.json; "):
        prepare.find(other, dataset.home)
    other = dataclasses.replace(dataset.config, verify="size")  # no part of what decides tokens
    assert prepare.find(other, dataset.home) == dataset.manifest
    elsewhere = dataclasses.replace(dataset.config, name="elsewhere")
    assert prepare.find(elsewhere, dataset.home) is None


def test_a_dataset_can_use_another_ones_tokenizer(dataset: Prepared, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(100)))
    file = f"{dataset.manifest.path}/{tokenizer.FILE_NAME}"
    keys = {"source": f"{tmp_path}/a.txt", "tokenizer": file, "document_bytes": 50}
    manifest = prepare.prepare(from_dict(DataConfig, keys | {"val_fraction": 0.3}), str(tmp_path))
    assert manifest.tokenizer_sha256 == dataset.manifest.tokenizer_sha256
    assert manifest.rows("train") + manifest.rows("val") > 20


@pytest.mark.usefixtures("ray_session")
def test_after_an_error_there_is_no_half_dataset(tmp_path: Path) -> None:
    corpus, home = tmp_path / "corpus", str(tmp_path / "home")
    corpus.mkdir()
    for i in range(5):
        (corpus / f"{i}.txt").write_text("\n\n".join(f"good text {n}" for n in range(30)))
    (corpus / "3.txt").write_bytes(b"good text\n\nbad \xff text")
    keys = {"source": str(corpus), "document_bytes": 50, "val_fraction": 0.3, "name": "half"}
    config = from_dict(DataConfig, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", 300)
        # The sample for the tokenizer ends before the bad file: a worker meets it.
        patch.setattr(prepare, "TOKENIZER_SAMPLE_BYTES", 300)
        with pytest.raises(DataError, match=r"3\.txt: not UTF-8 at byte 15 \(0xff\)"):
            prepare.prepare(config, home)
        assert not (Path(config.folder(home)) / manifests.FILE_NAME).exists()
        assert prepare.find(config, home) is None
        mended = dataclasses.replace(config, errors="replace")
        assert prepare.prepare(mended, home).rows("train") > 10


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the corpus holds no text"),
        (" \n\n", "the corpus holds no text"),
        ("one document", "none of its 1 documents fell into the"),
    ],
)
def test_a_corpus_without_text_for_both_splits_is_refused(
    content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(content)
    config = from_dict(DataConfig, {"source": str(tmp_path), "name": "empty"})
    with pytest.raises(DataError, match=words):
        prepare.prepare(config, str(tmp_path / "home"))
    assert prepare.find(config, str(tmp_path / "home")) is None


def test_a_missing_corpus_leaves_what_is_there_alone(tmp_path: Path) -> None:
    config = from_dict(DataConfig, {"source": str(tmp_path / "none"), "name": "here"})
    folder = Path(config.folder(str(tmp_path)))
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    with pytest.raises(DataError, match="no such file or folder"):
        prepare.prepare(config, str(tmp_path))
    assert (folder / "file").exists()


# --- the stream ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def order(dataset: Prepared) -> Order:
    """About five batches an epoch, so that a few batches span windows and epochs."""
    per_batch = dataset.manifest.tokens("train") // SEQ_LEN // 5 // 12 * 12
    return stream.train_order(dataset.manifest, 7, SEQ_LEN, per_batch)


@pytest.fixture(scope="module")
def expected(dataset: Prepared, order: Order) -> list[np.ndarray]:
    """Batches 0 to 13, by the order's arithmetic over tokens read with pyarrow alone."""
    groups = dataset.split("train")
    found: list[np.ndarray] = []
    for window in range(4):
        pieces = [groups[s.row_group][s.start : s.stop] for s in order.segments(window)]
        rows = sequences_of(np.concatenate(pieces), SEQ_LEN)
        shuffled = rows[order.sequences(window, 0, 0, 1)]
        found += np.split(shuffled, order.window_batches)
    return found[:14]


def streamed(dataset: Prepared, order: Order, start: int, stop: int, **share: Any) -> np.ndarray:
    batches = list(stream.train_batches(dataset.manifest, order, start=start, stop=stop, **share))
    assert {batch.shape for batch in batches} == {(share["micro_batch_size"], SEQ_LEN + 1)}
    return np.concatenate(batches)


def test_the_stream_is_the_order_over_windows_and_epochs(
    dataset: Prepared, order: Order, expected: list[np.ndarray]
) -> None:
    assert order.window_batches in range(4, 7)
    found = streamed(dataset, order, 0, 14, micro_batch_size=order.sequences_per_batch)
    assert np.array_equal(found, np.concatenate(expected))


def test_the_stream_from_a_later_start_is_the_same_whatever_the_micro_batch(
    dataset: Prepared, order: Order, expected: list[np.ndarray]
) -> None:
    for start, stop, micro in ((3, 4, 1), (7, 13, 4), (7, 13, 12)):
        found = streamed(dataset, order, start, stop, micro_batch_size=micro)
        assert np.array_equal(found, np.concatenate(expected[start:stop]))


def test_two_workers_share_each_global_batch(
    dataset: Prepared, order: Order, expected: list[np.ndarray]
) -> None:
    ranks = [
        streamed(dataset, order, 4, 9, micro_batch_size=6, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    shares = [np.split(rows, 5) for rows in ranks]
    for batch, first, second in zip(expected[4:9], *shares, strict=True):
        assert np.array_equal(np.concatenate([first, second]), batch)


def test_a_stream_of_no_batches_is_empty(dataset: Prepared, order: Order) -> None:
    assert (
        list(stream.train_batches(dataset.manifest, order, start=5, stop=5, micro_batch_size=1))
        == []
    )


@few
@given(st.integers(1, 30_000), st.integers(1, 100), st.integers(1, 5), st.integers(1, 4))
def test_each_val_target_is_on_one_worker_exactly_once(
    dataset: Prepared, tokens: int, seq_len: int, micro: int, world_size: int
) -> None:
    line = np.concatenate(dataset.split("val"))[: tokens + 1]
    ranks = [
        stream.val_batches(
            dataset.manifest,
            tokens=tokens,
            seq_len=seq_len,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.shape for batches in ranks for batch in batches} == {(micro, seq_len + 1)}
    rows = np.stack([np.stack(batches) for batches in ranks], axis=1).reshape(-1, seq_len + 1)
    inputs, targets = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    count = len(line) - 1
    assert np.array_equal(targets[:count], line[1:])
    assert np.array_equal(inputs[:count], line[:-1])
    assert (targets[count:] == -1).all()
    assert len(targets) - count < seq_len * micro * world_size  # no round of nothing


def test_val_tokens_beyond_the_split_are_the_whole_split(dataset: Prepared) -> None:
    (batch,) = stream.val_batches(dataset.manifest, tokens=10**9, seq_len=10**6, micro_batch_size=1)
    assert (batch >= 0).sum() == dataset.manifest.tokens("val")


@pytest.fixture
def damaged(dataset: Prepared, tmp_path: Path) -> Manifest:
    """A copy of the dataset whose largest shard is cut short."""
    shutil.copytree(dataset.manifest.path, tmp_path / "copy")
    largest = max(dataset.manifest.split("train"), key=lambda shard: shard.size)
    file = tmp_path / "copy" / largest.file
    file.write_bytes(file.read_bytes()[: largest.size // 2])
    return dataclasses.replace(dataset.manifest, path=str(tmp_path / "copy"))


def test_a_truncated_shard_is_named_when_it_is_read(damaged: Manifest, order: Order) -> None:
    file = max(damaged.split("train"), key=lambda shard: shard.size).file
    with pytest.raises(DataError, match=rf"{damaged.path}/{file}: row group \d cannot be read"):
        stream.read_segments(damaged.path, tuple(damaged.split("train")), order.segments(0))
    Path(damaged.path, file).unlink()
    with pytest.raises(DataError, match=rf"{damaged.path}/{file}: row group \d cannot be read"):
        stream.read_segments(damaged.path, tuple(damaged.split("train")), order.segments(0))


def test_a_truncated_shard_is_named_through_the_stream(damaged: Manifest, order: Order) -> None:
    file = max(damaged.split("train"), key=lambda shard: shard.size).file
    batches = stream.train_batches(damaged, order, start=0, stop=2, micro_batch_size=1)
    with pytest.raises(Exception) as caught:
        list(batches)
    cause = cluster.cause_of(caught.value)
    assert isinstance(cause, DataError)
    assert f"{damaged.path}/{file}" in str(cause)
    assert "\n" not in str(cause)  # what run_job prints, in one line


def test_a_shard_that_is_not_as_its_manifest_says_is_named(dataset: Prepared, order: Order) -> None:
    shards = [
        dataclasses.replace(shard, row_groups=[n + 1 for n in shard.row_groups])
        for shard in dataset.manifest.split("train")
    ]
    with pytest.raises(
        DataError, match=r"train-\d+\.parquet: row group \d has .* its manifest says"
    ):
        stream.read_segments(dataset.manifest.path, tuple(shards), order.segments(0))


# --- drawing ahead -------------------------------------------------------------------------------


def counting(count: int, drawn: list[int]) -> Iterator[np.ndarray]:
    for i in range(count):
        drawn.append(i)
        yield np.array([i])


@few
@given(st.integers(0, 20), st.integers(1, 5))
def test_ahead_gives_the_same_batches(count: int, depth: int) -> None:
    found = stream.ahead(counting(count, []), depth)
    assert [int(batch[0]) for batch in found] == list(range(count))
    assert list(found) == []


def test_ahead_starts_at_once_and_draws_no_more_than_its_depth() -> None:
    drawn: list[int] = []
    is_fourth = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        for batch in counting(100, drawn):
            if len(drawn) == 4:
                is_fourth.set()
            yield batch

    found = stream.ahead(batches(), depth=3)
    assert is_fourth.wait(10)  # three wait in the queue, and one to get in; none was asked for
    assert drawn == [0, 1, 2, 3]
    assert int(next(found)[0]) == 0


def test_ahead_raises_the_error_after_the_batches_before_it() -> None:
    def failing() -> Iterator[np.ndarray]:
        yield from counting(2, [])
        raise DataError("a shard is missing")

    found = stream.ahead(failing())
    assert [int(next(found)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="a shard is missing"):
        next(found)
