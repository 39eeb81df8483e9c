"""Shards: reading gives what was written, and a file has its name only once it is whole."""

import base64
import dataclasses
import gc
import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.datasets import (
    EOT,
    GROUP,
    SIZES,
    VAL,
    A,
    B,
    C,
    Data,
    chunks,
    footer_start,
    random_ids,
    write_shard,
)
from manta import storage
from manta.data import shards
from manta.data.manifest import Shard
from manta.data.shards import DIGEST_BYTES, DIGESTS, ShardReader, ShardWriter

few = settings(deadline=None, max_examples=60)

# --- writing and reading -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: np.ndarray
    group: int
    start: int
    stop: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes around the borders of row groups, and a range inside the shard."""
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
        # What the manifest will say about the file, computed from the file alone.
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
    """The number of calls that wrote the tokens does not matter."""
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

# fsspec's local:// stands for an object store: nothing is written next to the final place there.
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
