"""Damaged shards: nothing is ever read that the manifest does not vouch for."""

import base64
import dataclasses
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from helpers.datasets import GROUP, SIZES, VAL, A, B, C, Data, chunks, flip, footer_start, refusal
from manta.data import manifest as manifests
from manta.data import shards
from manta.data.manifest import Shard
from manta.data.shards import DIGEST_BYTES, DIGESTS, ShardReader

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
    assert VAL not in said  # its row groups' bytes are read only with full=True
    assert refusal(lambda: shards.verify(data.manifest, full=True)) == f"{said}; and 1 more"
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
    """Writes a file that Manta would not write; returns the entry of a manifest that vouches for
    it."""
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
    # The same rows in row groups of other sizes: a reader would get other tokens than it asks for.
    for size in (GROUP - 1, GROUP + 1, whole):
        assert "row group 0 has " in said(whole, digests, row_group_size=size)
    assert "no digests" in said(whole, {})
    few_digests = {DIGESTS: base64.b64encode(bytes(2 * DIGEST_BYTES))}
    assert "no digests" in said(whole, few_digests)
    assert "no digests" in said(whole, {DIGESTS: b"a"})


class BadDisk(LocalFileSystem):
    """Local files on a disk that damages what is read from it, as `spoil` says."""

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
    """This holds even if the file is replaced a moment later."""
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
            if is_same:  # the opened file still exists
                assert np.array_equal(reader.read(first, last), data.tokens[A][first:last])
            else:
                said = refusal(lambda reader=reader, a=first, b=last: reader.read(a, b))
                assert re.search(rf"{path}: row group \d is damaged", said)
    assert str(path) in refusal(lambda: data.read(A))


def test_a_shard_that_is_deleted_while_it_is_read_gives_its_tokens(data: Data) -> None:
    reader = data.open(A)
    data.path(A).unlink()
    assert np.array_equal(reader.read(0, SIZES[A]), data.tokens[A])
