"""Shards and their manifest: nothing is ever read that the manifest does not vouch for."""

import base64
import dataclasses
import errno
import gc
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta import layout, storage
from manta.data import manifest as manifests
from manta.data import shards
from manta.data.manifest import Manifest, Shard
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Phase, make_stages
from manta.data.shards import DIGEST_BYTES, DIGESTS, TAIL_BYTES, ShardReader, ShardWriter
from manta.data.stream import IGNORED, Reader
from manta.errors import DataError
from manta.text import tokenizer

few = settings(deadline=None, max_examples=60)
fewer = settings(deadline=None, max_examples=15)

EOT = 0
VOCAB_SIZE = 60_000
GROUP = 32
SEQ_LEN = 10


def random_ids(seed: int, count: int) -> np.ndarray:
    """Ids that do not compress, so that shards of as many tokens often have the same size."""
    ids = np.random.default_rng(seed).integers(1, VOCAB_SIZE, count, dtype=np.uint16)
    ids[16::17] = EOT
    ids[-1] = EOT
    return ids


def write_shard(
    folder: Path, file: str, tokens: np.ndarray, row_group_tokens: int = GROUP, split: str = "train"
) -> Shard:
    writer = ShardWriter(str(folder / file), tokens.dtype, row_group_tokens)
    writer.write(tokens)
    documents, most = int((tokens == EOT).sum()), int(tokens.max())
    return Shard(file, split, documents, len(tokens), 2 * len(tokens), most, *writer.close())  # type: ignore[arg-type]


def write_dataset(
    folder: Path,
    train: Sequence[np.ndarray],
    val: Sequence[np.ndarray],
    row_group_tokens: int = GROUP,
) -> Manifest:
    """A dataset of these shards, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer.train(["some text"], 260)
    storage.write_bytes(str(folder / layout.ENCODING), made.serialized)
    found = [
        write_shard(folder, f"{split}-{i:05d}.parquet", tokens, row_group_tokens, split)
        for split, pieces in (("train", train), ("val", val))
        for i, tokens in enumerate(pieces)
    ]
    recipe = {"source": {"location": "/ü", "subset": None}, "val_fraction": 0.05}
    manifest = Manifest(
        str(folder), recipe, made.name, made.sha256, VOCAB_SIZE, EOT, str(train[0].dtype),  # type: ignore[arg-type]
        row_group_tokens, {"empty": 1}, {"documents": [1, 2], "tokens": [1, 5]}, tuple(found),
    )  # fmt: skip
    manifest.save()
    return manifest


@dataclasses.dataclass(frozen=True)
class Data:
    manifest: Manifest
    tokens: dict[str, np.ndarray]

    @property
    def folder(self) -> Path:
        return Path(self.manifest.path)

    def path(self, file: str) -> Path:
        return self.folder / file

    def shard(self, file: str) -> Shard:
        return next(shard for shard in self.manifest.shards if shard.file == file)

    def open(self, file: str) -> ShardReader:
        """Anew, whatever is open already."""
        return ShardReader(self.manifest.path, self.shard(file), self.manifest.dtype, GROUP)

    def read(self, file: str) -> np.ndarray:
        return self.open(file).read(0, self.shard(file).tokens)

    def other_shard(self, file: str) -> bytes:
        """A well-formed shard of other tokens with as many bytes."""
        shard = self.shard(file)
        with tempfile.TemporaryDirectory() as folder:
            for seed in itertools.count(100):
                tokens = random_ids(seed, shard.tokens)
                if write_shard(Path(folder), "other.parquet", tokens).size == shard.size:
                    break
            return (Path(folder) / "other.parquet").read_bytes()


# The first two have the same number of bytes: what tells them apart is inside.
A, B, C, VAL = (
    f"{name}.parquet" for name in ("train-00000", "train-00001", "train-00002", "val-00000")
)
SIZES = {A: 3 * GROUP, B: 3 * GROUP, C: 4 * GROUP + 5, VAL: GROUP + 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("dataset")
    for seed in itertools.count():
        pieces = [random_ids(10 * seed + i, size) for i, size in enumerate(SIZES.values())]
        manifest = write_dataset(folder, pieces[:3], pieces[3:])
        if manifest.shards[0].size == manifest.shards[1].size:
            break
    return Data(manifest, dict(zip(SIZES, pieces, strict=True)))


@pytest.fixture
def data(original: Data, tmp_path: Path) -> Data:
    """A copy of the dataset, to be damaged."""
    shutil.copytree(original.folder, tmp_path / "copy")
    return Data(
        dataclasses.replace(original.manifest, path=str(tmp_path / "copy")), original.tokens
    )


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def chunks(shard: Path | io.BytesIO) -> list[tuple[int, int]]:
    """Where the bytes of each row group are: [start, stop)."""
    metadata = pq.read_metadata(shard)
    columns = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
    return [(c.data_page_offset, c.data_page_offset + c.total_compressed_size) for c in columns]


def footer_start(content: bytes) -> int:
    return len(content) - TAIL_BYTES - int.from_bytes(content[-TAIL_BYTES:-4], "little")


def refusal(call: Callable[[], Any]) -> str:
    """The one line that a DataError says."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- writing and reading -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: np.ndarray
    group: int
    start: int
    stop: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes around the borders of row groups, and some part of what is in the shard."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    group = draw(st.integers(1, 40))
    count = max(1, group * draw(st.integers(0, 5)) + draw(st.integers(-1, 1)))
    most = draw(st.sampled_from([1, 300, np.iinfo(dtype).max]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens = rng.integers(0, most, count, dtype=dtype, endpoint=True)
    start = draw(st.integers(0, count - 1))
    return Case(tokens, group, start, draw(st.integers(start + 1, count)))


@few
@given(cases())
@example(Case(np.array([0, 65535, 65535], np.uint16), 1, 0, 3))
@example(Case(np.array([0, 2**32 - 1], np.uint32), 2, 1, 2))
def test_what_is_written_is_read(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder), A, case.tokens, case.group)
        reader = ShardReader(folder, shard, str(case.tokens.dtype), case.group)
        for start, stop in ((case.start, case.stop), (0, len(case.tokens))):
            found = reader.read(start, stop)
            assert found.dtype == case.tokens.dtype
            assert np.array_equal(found, case.tokens[start:stop])
        # What the manifest will say of the file, worked out from the file alone.
        content = (Path(folder) / A).read_bytes()
        footer = content[footer_start(content) :]
        assert shard.size == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
        assert shard.footer_sha256 == hashlib.sha256(footer).hexdigest()
        metadata = pq.read_metadata(Path(folder) / A)
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        parts = [case.tokens[i : i + case.group] for i in range(0, len(case.tokens), case.group)]
        assert groups == [len(part) for part in parts]


@few
@given(cases(), st.integers(1, 3))
def test_the_same_tokens_give_the_same_bytes(case: Case, groups_a_call: int) -> None:
    """However many calls wrote them."""
    with tempfile.TemporaryDirectory() as folder:
        first = write_shard(Path(folder), A, case.tokens, case.group)
        writer = ShardWriter(f"{folder}/{B}", case.tokens.dtype, case.group)
        step = groups_a_call * case.group
        for start in range(0, len(case.tokens), step):
            writer.write(case.tokens[start : start + step])
        assert writer.close() == (first.size, first.sha256, first.footer_sha256)
        assert (Path(folder) / A).read_bytes() == (Path(folder) / B).read_bytes()


def test_every_byte_but_the_first_four_has_a_digest(original: Data) -> None:
    for file in SIZES:
        path = original.path(file)
        content, bounds = path.read_bytes(), chunks(path)
        edges = [(0, 4), *bounds, (footer_start(content), len(content))]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        digests = base64.b64decode(pq.read_metadata(path).metadata[DIGESTS])
        for i, (start, stop) in enumerate(bounds):
            digest = hashlib.sha256(content[start:stop]).digest()[:DIGEST_BYTES]
            assert digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] == digest


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_shard_is_plain_parquet(dtype: str, tmp_path: Path) -> None:
    tokens = random_ids(0, 100).astype(dtype)
    write_shard(tmp_path, A, tokens)
    file = pq.ParquetFile(tmp_path / A)
    assert file.schema_arrow.names == ["tokens"]
    assert str(file.schema_arrow.field("tokens").type) == dtype
    assert file.schema_arrow.pandas_metadata is None
    assert file.schema.column(0).physical_type == "INT32"  # numbers, nothing pickled
    assert set(file.metadata.metadata) == {b"ARROW:schema", DIGESTS}
    assert np.array_equal(pq.read_table(tmp_path / A)["tokens"].to_numpy(), tokens)
    frame = pd.read_parquet(tmp_path / A)
    assert list(frame.columns) == ["tokens"]
    assert frame["tokens"].dtype == dtype
    assert np.array_equal(frame["tokens"].to_numpy(), tokens)


def test_a_splits_tokens_are_its_shards_one_after_the_other(original: Data) -> None:
    train = np.concatenate([original.tokens[file] for file in (A, B, C)])
    assert np.array_equal(shards.split_tokens(original.manifest, "train"), train)
    assert np.array_equal(shards.split_tokens(original.manifest, "val"), original.tokens[VAL])
    for limit in (1, GROUP, SIZES[A], SIZES[A] + 1, len(train), len(train) + 1):
        found = shards.split_tokens(original.manifest, "train", limit)
        assert np.array_equal(found, train[:limit])


def test_documents_come_without_their_end_of_text(original: Data) -> None:
    for shard in original.manifest.shards:
        found = list(shards.documents(original.manifest, shard))
        assert len(found) == shard.documents
        assert not any(EOT in document for document in found)
        ended = np.concatenate([[*document, EOT] for document in found])
        assert np.array_equal(ended, original.tokens[shard.file])


def test_an_open_shard_is_kept_and_one_made_anew_is_opened_anew(data: Data) -> None:
    def opened(shard: Shard) -> ShardReader:
        return shards.open_shard(data.manifest.path, shard, "uint16", GROUP)

    assert opened(data.shard(A)) is opened(data.shard(A))
    tokens = random_ids(50, SIZES[A])
    anew = write_shard(data.folder, A, tokens)
    assert np.array_equal(opened(anew).read(0, SIZES[A]), tokens)


# --- a file being written ------------------------------------------------------------------------

# fsspec's local:// stands for an object store: nothing is written beside its place there.
PLACES = ["", "file://", "local://"]


@pytest.mark.parametrize("place", PLACES)
def test_a_writer_knows_size_and_digests_and_commits_in_one_piece(
    place: str, tmp_path: Path
) -> None:
    path = tmp_path / "a" / "b"
    writer = storage.HashingWriter(f"{place}{path}")
    for data in (b"one", memoryview(b"two"), np.arange(3)):
        writer.start_part()
        assert writer.write(data) == memoryview(data).nbytes
    if place != "local://":
        assert not path.exists()
    writer.commit()
    expected = b"onetwo" + np.arange(3).tobytes()
    assert path.read_bytes() == expected
    assert (writer.size, writer.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())
    assert writer.part_digest() == hashlib.sha256(np.arange(3).tobytes()).digest()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("place", [*PLACES, "memory://manta-test-shards"])
def test_after_an_error_no_file_has_the_name(place: str, tmp_path: Path) -> None:
    path = f"{place}{tmp_path}/data/{A}"

    def fail() -> None:
        writer = ShardWriter(path, np.dtype(np.uint16), GROUP)
        writer.write(random_ids(0, 5 * GROUP))
        writer.write(np.array([70_000]))  # no uint16: refused, not wrapped round to 4,464

    with pytest.raises(pa.ArrowInvalid, match="70000"):
        fail()
    gc.collect()  # what Python closes then
    assert not storage.exists(path)
    storage.remove_unfinished(f"{place}{tmp_path}/data")
    assert storage.list_files(f"{place}{tmp_path}/data") == []


def test_after_an_error_the_file_that_was_there_is_whole(data: Data) -> None:
    before = {file.name: file.read_bytes() for file in data.folder.iterdir()}
    writer = ShardWriter(str(data.path(A)), np.dtype(np.uint16), GROUP)
    writer.write(random_ids(1, GROUP))
    del writer
    gc.collect()
    storage.remove_unfinished(data.manifest.path)
    assert {file.name: file.read_bytes() for file in data.folder.iterdir()} == before


def test_writing_a_file_in_one_piece_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"first", b"", b"second"):
        storage.write_bytes(str(tmp_path / "a"), content)
        assert (tmp_path / "a").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        storage.write_bytes(str(tmp_path / "folder"), b"no name for it")
    storage.remove_unfinished(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"a", "folder"}


# --- the manifest --------------------------------------------------------------------------------


def test_a_manifest_comes_back_equal(original: Data) -> None:
    path = original.manifest.path
    assert manifests.exists(path)
    back = manifests.load(path)
    assert back == original.manifest
    assert back.sha256 == original.manifest.sha256
    assert back.tokens("train") == SIZES[A] + SIZES[B] + SIZES[C]
    assert (back.tokens("val"), back.text_bytes("val")) == (SIZES[VAL], 2 * SIZES[VAL])
    manifests.check(back)
    for full in (False, True):
        shards.verify(back, full=full)


def test_without_a_manifest_there_is_no_dataset(data: Data) -> None:
    data.path(layout.MANIFEST).unlink()
    assert not manifests.exists(data.manifest.path)
    assert "MANIFEST.json: no such file" in refusal(lambda: manifests.load(data.manifest.path))


def edit(data: Data, change: Callable[[dict[str, Any]], Any]) -> str:
    """Changes the manifest as a person might, with an editor; what loading it says then."""
    path = data.path(layout.MANIFEST)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return refusal(lambda: manifests.load(data.manifest.path))


def test_another_versions_manifest_is_named_with_both_versions(data: Data) -> None:
    said = edit(data, lambda content: content.update(format="manta-data-1"))
    assert f"{data.path('MANIFEST.json')}: its format is 'manta-data-1'" in said
    assert f"reads '{manifests.FORMAT}'" in said
    assert f"delete {data.folder} " in said
    assert "format is None" in edit(data, lambda content: content.pop("format"))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["shards"][1].update(tokens=content["shards"][1]["tokens"] - 1),
        lambda content: content["shards"][2].update(sha256="0" * 64),
        lambda content: content.update(row_group_tokens=GROUP - 1),
        lambda content: content.update(vocab_size=VOCAB_SIZE + 1),
        lambda content: content["recipe"].update(val_fraction=0.06),
        lambda content: content["shards"].pop(),
        lambda content: content["shards"].clear(),
        lambda content: content["shards"].append(content["shards"][0]),
        lambda content: content["shards"].reverse(),
        lambda content: content.update(more=1),
        lambda content: content.update(tokenizer="\ud800"),
        lambda content: content.pop("eot"),
        lambda content: content.pop("sha256"),
        lambda content: content.update(sha256=None),
    ],
)
def test_an_edited_manifest_is_refused(change: Callable[[dict[str, Any]], Any], data: Data) -> None:
    said = edit(data, change)
    assert f"{data.path('MANIFEST.json')}: edited or damaged (its sha256 differs)" in said
    assert f"delete {data.folder} " in said


def test_a_manifest_with_its_keys_in_another_order_is_the_same(data: Data) -> None:
    path = data.path(layout.MANIFEST)
    content = json.loads(path.read_text())
    reordered = dict(reversed(content.items()))
    reordered["shards"] = [dict(sorted(shard.items())) for shard in content["shards"]]
    path.write_text(json.dumps(reordered, indent=4))
    assert manifests.load(data.manifest.path) == data.manifest


def test_a_manifest_whose_digest_is_right_and_its_keys_are_not_is_refused(data: Data) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["sha256"], content["eot"]
        content["sha256"] = manifests._digest(content)

    assert "MANIFEST.json: damaged (" in edit(data, change)


def test_a_truncated_manifest_is_refused(data: Data) -> None:
    path = data.path(layout.MANIFEST)
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 29):
        path.write_bytes(content[:length])
        said = refusal(lambda: manifests.load(data.manifest.path))
        assert f"{path}: not valid JSON" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"shards: [a, b]", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"PAR1", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "format is None"),
        (b"3", "format is None"),
        (b"{}", "format is None"),
        (b'{"format": "manta-data-2"}', "edited or damaged"),
        (b'{"format": "manta-data-2", "recipe": "\xed\xa0\x80"}', "MANIFEST.json: "),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, words: str, data: Data) -> None:
    data.path(layout.MANIFEST).write_bytes(content)
    assert words in refusal(lambda: manifests.load(data.manifest.path))


def test_a_manifest_that_contradicts_itself_is_refused(original: Data) -> None:
    largest = max(shard.max_token for shard in original.manifest.shards)
    manifests.check(dataclasses.replace(original.manifest, vocab_size=largest + 1))
    said = refusal(
        lambda: manifests.check(dataclasses.replace(original.manifest, vocab_size=largest))
    )
    assert re.search(rf"/(train|val)-\d+\.parquet: holds token id {largest}, but", said)
    assert f"has {largest}; prepare the data anew" in said
    twice = (*original.manifest.shards, original.shard(B))
    said = refusal(lambda: manifests.check(dataclasses.replace(original.manifest, shards=twice)))
    assert f"MANIFEST.json: lists {B} twice" in said


def test_a_missing_or_another_tokenizer_is_refused(data: Data) -> None:
    path = data.path(layout.ENCODING)
    assert data.manifest.load_tokenizer().sha256 == data.manifest.tokenizer_sha256
    content = path.read_bytes()
    path.write_bytes(tokenizer.train(["other text"], 265).serialized)
    said = refusal(data.manifest.load_tokenizer)
    assert f"{path}: not the tokenizer that this dataset was made with" in said
    path.write_bytes(content[:-10])
    assert f"{path}: not a tokenizer" in refusal(data.manifest.load_tokenizer)
    path.unlink()
    assert f"{path}: no such file" in refusal(data.manifest.load_tokenizer)


# --- what is wrong with a folder -----------------------------------------------------------------


def test_files_that_are_not_in_the_manifest_are_never_read(data: Data, original: Data) -> None:
    shutil.copy(data.path(A), data.path("train-00003.parquet"))
    data.path("train-00004.parquet").write_bytes(b"no shard")
    data.path("train-00005.parquet").mkdir()
    manifest = manifests.load(data.manifest.path)
    assert manifest == data.manifest
    shards.verify(manifest, full=True)
    for split in ("train", "val"):
        expected = shards.split_tokens(original.manifest, split)
        assert np.array_equal(shards.split_tokens(manifest, split), expected)


def test_verify_names_every_bad_shard(data: Data) -> None:
    data.path(A).unlink()
    os.truncate(data.path(B), data.shard(B).size - 1)
    flip(data.path(C), data.shard(C).size - 20)
    flip(data.path(VAL), chunks(data.path(VAL))[1][0] + 1)
    wrong = {
        A: "the file is missing",
        B: f"{data.shard(B).size - 1} bytes, but its manifest says {data.shard(B).size}",
        C: "its footer is not the one that its manifest vouches for",
    }
    said = refusal(lambda: shards.verify(data.manifest, full=False))
    for file, reason in wrong.items():
        assert f"{data.path(file)}: {reason}" in said
    assert VAL not in said  # the bytes of its row groups are another matter
    assert refusal(lambda: shards.verify(data.manifest, full=True)) == f"{said} (and 1 more)"
    for file in (A, B, C):
        shutil.rmtree(data.path(file), ignore_errors=True)
    said = refusal(lambda: shards.verify(data.manifest, full=True, splits=("val",)))
    assert f"{data.path(VAL)}: its sha256 differs from its manifest's" in said
    shards.verify(data.manifest, full=False, splits=("val",))


@pytest.mark.parametrize("place", [0, 3])
def test_what_no_reader_reads_is_still_verified(place: int, data: Data) -> None:
    flip(data.path(A), place)
    assert np.array_equal(data.read(A), data.tokens[A])
    shards.verify(data.manifest, full=False)
    assert A in refusal(lambda: shards.verify(data.manifest, full=True))


def test_a_missing_shard_is_named(data: Data) -> None:
    data.path(B).unlink()
    for call in (
        lambda: data.read(B),
        lambda: shards.split_tokens(data.manifest, "train"),
        lambda: list(shards.documents(data.manifest, data.shard(B))),
        lambda: shards.verify(data.manifest, full=False),
    ):
        said = refusal(call)
        assert f"{data.path(B)}: the file is missing. Not trained on; restore the file" in said
        assert f"delete {data.folder} " in said


def test_a_damaged_row_group_is_named_and_the_others_are_read(data: Data) -> None:
    flip(data.path(C), chunks(data.path(C))[2][1] - 1)
    reader = data.open(C)
    for start, stop in ((2 * GROUP, 3 * GROUP), (3 * GROUP - 1, 3 * GROUP), (0, SIZES[C])):
        said = refusal(lambda start=start, stop=stop: reader.read(start, stop))
        assert f"{data.path(C)}: row group 2 is damaged" in said
    for start, stop in ((0, 2 * GROUP), (3 * GROUP, SIZES[C])):
        assert np.array_equal(reader.read(start, stop), data.tokens[C][start:stop])


@pytest.mark.parametrize("other", [B, C])
def test_swapped_files_are_named(other: str, data: Data) -> None:
    assert (data.shard(A).size == data.shard(other).size) == (other == B)
    first, second = data.path(A).read_bytes(), data.path(other).read_bytes()
    data.path(A).write_bytes(second)
    data.path(other).write_bytes(first)
    said = refusal(lambda: shards.verify(data.manifest, full=False))
    for file in (A, other):
        assert f"{data.path(file)}: " in said
        reason = "its footer is not the one" if other == B else "bytes, but its manifest says"
        assert reason in refusal(lambda file=file: data.read(file))
    assert str(data.path(C if other == B else B)) not in said


def test_a_well_formed_shard_of_other_tokens_is_named(data: Data) -> None:
    data.path(A).write_bytes(data.other_shard(A))
    assert len(pq.read_table(data.path(A))) == SIZES[A]
    said = refusal(lambda: data.read(A))
    assert f"{data.path(A)}: its footer is not the one that its manifest vouches for" in said
    shards.verify(data.manifest, full=False, splits=("val",))


def vouched(data: Data, table: pa.Table, metadata: dict[bytes, bytes], **options: Any) -> Shard:
    """A file that is not as Manta writes them, and what a manifest that vouches for it says."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table, **options)
        writer.add_key_value_metadata(metadata)
    content = sink.getvalue()
    data.path(A).write_bytes(content)
    footer = content[footer_start(content) :]
    return dataclasses.replace(
        data.shard(A),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tokens": "uint32"}, "its columns are tokens uint32, its manifest says tokens uint16"),
        ({"tokens": "int64"}, "its columns are tokens int64, its manifest says tokens uint16"),
        ({"tokens": "int16"}, "its columns are tokens int16, its manifest says tokens uint16"),
        ({"tokens": "double"}, "its columns are tokens double, its manifest says tokens uint16"),
        ({"token": "uint16"}, "its columns are token uint16, its manifest says tokens uint16"),
        ({"tokens": "uint16", "more": "uint16"}, "its columns are ['tokens', 'more'], "),
        ({}, "its columns are [], "),
    ],
)
def test_a_shard_of_another_kind_is_named(columns: dict[str, str], words: str, data: Data) -> None:
    ids = pa.array(range(SIZES[A]))
    table = pa.table({name: ids.cast(kind) for name, kind in columns.items()})
    shard = vouched(data, table, {})
    said = refusal(lambda: ShardReader(data.manifest.path, shard, "uint16", GROUP))
    assert f"{data.path(A)}: {words}" in said


def test_a_shard_with_other_rows_is_named(data: Data) -> None:
    digests = {DIGESTS: base64.b64encode(bytes(3 * DIGEST_BYTES))}

    def said(count: int, metadata: dict[bytes, bytes], **options: Any) -> str:
        table = pa.table({"tokens": pa.array(range(count), "uint16")})
        shard = vouched(data, table, metadata, **{"row_group_size": GROUP, **options})
        found = refusal(lambda: ShardReader(data.manifest.path, shard, "uint16", GROUP))
        assert found.startswith(f"{data.path(A)}: ")
        return found

    whole = SIZES[A]
    assert f"{whole - 1} rows, its manifest says {whole} tokens" in said(whole - 1, digests)
    # As many rows in row groups of other sizes: a reader would take other tokens than it asks for.
    for size in (GROUP - 1, GROUP + 1, whole):
        assert "row group 0 has " in said(whole, digests, row_group_size=size)
    assert "no digests" in said(whole, {})
    few_digests = {DIGESTS: base64.b64encode(bytes(2 * DIGEST_BYTES))}
    assert "no digests" in said(whole, few_digests)
    assert "no digests" in said(whole, {DIGESTS: b"a"})


class BadDisk(LocalFileSystem):
    """Local files, on a disk that spoils what it reads as `spoil` says."""

    protocol = "baddisk"
    spoil: Callable[[bytes, int], bytes]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return BadFile(super()._open(path, mode, **kwargs))


class BadFile(io.RawIOBase):
    def __init__(self, file: Any):
        super().__init__()
        self._file = file
        self.size = file.size

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        start = self._file.tell()
        return BadDisk.spoil(self._file.read(count), start)


@pytest.fixture
def on_bad_disk(data: Data) -> Data:
    fsspec.register_implementation("baddisk", BadDisk, clobber=True)
    BadDisk.spoil = staticmethod(lambda read, start: read)
    manifest = dataclasses.replace(data.manifest, path=f"baddisk://{data.folder}")
    return Data(manifest, data.tokens)


def test_what_a_disk_cannot_read_is_named(data: Data, on_bad_disk: Data) -> None:
    def fail_at(place: int) -> None:
        def spoil(read: bytes, start: int) -> bytes:
            if start <= place < start + len(read):
                raise OSError(errno.EIO, "Input/output error")
            return read

        BadDisk.spoil = staticmethod(spoil)

    fail_at(chunks(data.path(C))[2][0])
    reader = on_bad_disk.open(C)
    assert np.array_equal(reader.read(0, 2 * GROUP), data.tokens[C][: 2 * GROUP])
    said = refusal(lambda: reader.read(0, 3 * GROUP))
    assert f"{data.path(C)}: row groups 0 to 2 cannot be read (" in said
    said = refusal(lambda: shards.verify(on_bad_disk.manifest, full=True))
    assert f"{data.path(C)}: cannot be read (" in said
    assert "Input/output error" in said
    fail_at(data.shard(C).size - 30)
    said = refusal(lambda: on_bad_disk.open(C))
    assert f"{data.path(C)}: cannot be read (" in said


def test_the_bytes_that_are_checked_are_those_that_are_decoded(on_bad_disk: Data) -> None:
    """Even where the file is another one a moment after."""
    reader = on_bad_disk.open(A)
    seen: set[int] = set()

    def only_once(read: bytes, start: int) -> bytes:
        places = set(range(start, start + len(read)))
        is_again = bool(seen & places)
        seen.update(places)
        return bytes(len(read)) if is_again else read

    BadDisk.spoil = staticmethod(only_once)
    assert np.array_equal(reader.read(0, SIZES[A]), on_bad_disk.tokens[A])
    assert "row group 0 is damaged" in refusal(lambda: reader.read(0, SIZES[A]))


# --- while a run reads ---------------------------------------------------------------------------


def in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def by_name(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("replace", [in_place, by_name])
@pytest.mark.parametrize("kind", ["same size", "shorter", "longer", "empty", "mixed"])
def test_a_shard_that_changes_while_it_is_read_gives_its_tokens_or_an_error(
    replace: Callable[[Path, bytes], None], kind: str, data: Data
) -> None:
    other, path = data.other_shard(A), data.path(A)
    start, stop = chunks(path)[1]
    content = {
        "same size": other,
        "shorter": other[:stop],
        "longer": other + other,
        "empty": b"",
        "mixed": path.read_bytes()[:start] + other[start:],
    }[kind]
    shard = data.shard(A)
    readers = [shards.open_shard(data.manifest.path, shard, "uint16", GROUP) for _ in range(2)] + [
        data.open(A)
    ]
    for reader in readers:
        assert np.array_equal(reader.read(0, GROUP), data.tokens[A][:GROUP])
    replace(path, content)
    for reader in readers:
        for first, last in ((0, GROUP), (GROUP, 2 * GROUP), (0, SIZES[A])):
            is_same = replace is by_name or (kind == "mixed" and last == GROUP)
            if is_same:  # the file that was opened goes on to be there
                assert np.array_equal(reader.read(first, last), data.tokens[A][first:last])
            else:
                said = refusal(lambda reader=reader, a=first, b=last: reader.read(a, b))
                assert re.search(rf"{path}: row group \d is damaged", said)
    assert str(path) in refusal(lambda: data.read(A))


def test_a_shard_that_is_deleted_while_it_is_read_gives_its_tokens(data: Data) -> None:
    reader = data.open(A)
    data.path(A).unlink()
    assert np.array_equal(reader.read(0, SIZES[A]), data.tokens[A])


# --- going on without what is damaged ------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A dataset in which no token comes twice, so that a token says where it is from."""
    ends = np.cumsum([7, *SIZES.values()])
    pieces = [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends)]
    manifest = write_dataset(tmp_path_factory.mktemp("numbered"), pieces[:3], pieces[3:])
    return Data(manifest, dict(zip(SIZES, pieces, strict=True)))


def reader_of(manifest: Manifest, **options: Any) -> Reader:
    """Three batches are about an epoch of its train split."""
    stages = make_stages({}, SEQ_LEN, 10 * SEQ_LEN)
    order = make_order((manifest,), (Phase(0, (PERIOD,)),), stages, 3, SEQ_LEN)
    return Reader((manifest,), order, **options)


GROUPS = [(file, i) for file in (A, B, C) for i in range(-(-SIZES[file] // GROUP))]


@fewer
@given(st.sets(st.sampled_from(GROUPS), max_size=5), st.none() | st.sampled_from([A, B, C]))
@example({(C, 4)}, None)
@example(set(GROUPS), A)
def test_what_is_damaged_is_ignored_and_nothing_else(
    numbered: Data, damaged: set[tuple[str, int]], missing: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(numbered.folder, folder, dirs_exist_ok=True)
        manifest = dataclasses.replace(numbered.manifest, path=folder)
        for file, group in damaged:
            flip(Path(folder) / file, chunks(numbered.path(file))[group][0] + 5)
        if missing:
            (Path(folder) / missing).unlink()
        reader = reader_of(manifest, skip_corrupt=True)
        gone = [numbered.tokens[f][i * GROUP : (i + 1) * GROUP] for f, i in damaged]
        gone += [numbered.tokens[missing]] if missing else []
        for batch in (0, 1, 3, 7):
            expected, nothing = reader_of(numbered.manifest).read(batch)
            assert not nothing
            is_gone = np.isin(expected, np.concatenate(gone or [[]]))
            found, notes = reader.read(batch)
            assert np.array_equal(found, np.where(is_gone, IGNORED, expected.astype(np.int32)))
            assert bool(notes) >= is_gone.any()
            for note in notes:
                assert re.match(rf"skipping \d+ tokens: {folder}/train-0000\d.parquet: ", note)
                if missing and missing in note:
                    assert "the file is missing" in note
                else:
                    file, group = re.findall(r"(train-\d+.parquet): row group (\d+) is dam", note)[
                        0
                    ]
                    assert (file, int(group)) in damaged
                    assert "its sha256 is not the one in the footer" in note
            block = reader({"first_batch": [batch]})
            assert np.array_equal(block["tokens"], found)
            assert block["note"][0].splitlines() == notes
            assert not any(block["note"][1:])
        if gone:
            assert folder in refusal(lambda: [reader_of(manifest).read(b) for b in range(12)])


def test_the_notes_name_each_damaged_row_group(numbered: Data, data: Data) -> None:
    shutil.copytree(numbered.folder, data.folder, dirs_exist_ok=True)
    damaged = {(A, 1), (B, 0), (C, 4)}
    for file, group in damaged:
        flip(data.path(file), chunks(data.path(file))[group][0])
    reader = reader_of(
        dataclasses.replace(numbered.manifest, path=str(data.folder)), skip_corrupt=True
    )
    notes = [note for batch in range(9) for note in reader.read(batch)[1]]
    named = {
        (file, int(group))
        for note in notes
        for file, group in re.findall(r"(train-\d+.parquet): row group (\d+) is damaged", note)
    }
    assert named == damaged
