"""Shards: plain Parquet files of token ids, whose bytes are all checked before they are decoded.

A shard has one column, `tokens`, with one row per token, uint16 or uint32; an end-of-text token
ends each document. The manifest has the sha256 of the footer, and the footer has the sha256 (its
first 16 bytes) of each row group's bytes. So a reader of one row group checks exactly what it
reads.
"""

import base64
import functools
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manta import storage
from manta.data.manifest import Manifest, Shard
from manta.errors import DataError
from manta.terminal import named

COLUMN = "tokens"
SPLITS = ("train", "val", "test")
DIGESTS = b"manta.row_groups"
DIGEST_BYTES = 16
MAGIC = b"PAR1"
TAIL_BYTES = 8  # the length of the footer, and MAGIC


def digest_of(data: Any) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


class ShardWriter:
    """Writes a shard, in row groups of exactly `row_group_tokens`; the last one may be shorter.

    The file appears under its name only when it is whole.
    """

    def __init__(self, path: str, dtype: np.dtype, row_group_tokens: int):
        self._sink = storage.HashingWriter(path)
        self._size = row_group_tokens
        schema = pa.schema([pa.field(COLUMN, pa.from_numpy_dtype(dtype), nullable=False)])
        self._schema = schema
        # Split byte streams: the two zero bytes that Parquet adds to a uint16 then cost nothing.
        self._parquet = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={COLUMN: "BYTE_STREAM_SPLIT"},
            write_statistics=False,
        )
        self._digests: list[bytes] = []

    def write(self, tokens: np.ndarray) -> None:
        """Appends tokens: whole row groups, except in the last call."""
        for start in range(0, len(tokens), self._size):
            self._sink.start_part()
            part = pa.array(tokens[start : start + self._size])
            table = pa.Table.from_arrays([part], schema=self._schema)
            self._parquet.write_table(table, row_group_size=self._size)
            self._digests.append(self._sink.part_digest()[:DIGEST_BYTES])

    def close(self) -> tuple[int, str, str]:
        """Finishes the file; returns (size in bytes, sha256 of the file, sha256 of its footer)."""
        value = base64.b64encode(b"".join(self._digests))
        self._parquet.add_key_value_metadata({DIGESTS: value})
        self._sink.start_part()
        self._parquet.close()
        self._sink.commit()
        return self._sink.size, self._sink.sha256, self._sink.part_digest().hex()


class ShardReader:
    """An open shard whose footer matches the manifest.

    Raises:
        DataError: the file is missing, truncated or another file, or its footer is damaged.
    """

    def __init__(self, path: str, shard: Shard, dtype: str, row_group_tokens: int):
        self.file = storage.join(path, shard.file)
        self._shard, self._row_group_tokens = shard, row_group_tokens
        fs, inside = storage.filesystem(self.file)
        try:
            self._input = fs.open_input_file(inside)
            size = self._input.size()
        except FileNotFoundError:
            raise self._error("the file is missing") from None
        except OSError as e:
            raise self._error(f"cannot be opened ({e})") from None
        if size != shard.size:
            raise self._error(f"{size} bytes, but its manifest says {shard.size}")
        self._metadata = self._read_footer()
        self._check_schema(dtype)
        count = -(-shard.tokens // row_group_tokens)
        digests = self._read_digests(count)
        self._digests = [digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(count)]
        self._chunks = []
        for index in range(count):
            group = self._metadata.row_group(index)
            rows = min(row_group_tokens, shard.tokens - index * row_group_tokens)
            if group.num_rows != rows:
                raise self._error(
                    f"row group {index} has {group.num_rows} rows, its manifest says {rows}"
                )
            column = group.column(0)
            self._chunks.append((column.data_page_offset, column.total_compressed_size))

    def _read_footer(self) -> pq.FileMetaData:
        size = self._shard.size
        try:
            tail = self._input.read_at(TAIL_BYTES, size - TAIL_BYTES)
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != MAGIC or length > size - TAIL_BYTES:
                raise self._error("it does not end as a Parquet file does")
            footer = self._input.read_at(length + TAIL_BYTES, size - TAIL_BYTES - length)
        except (OSError, ValueError) as e:
            raise self._error(f"cannot be read ({e})") from None
        if hashlib.sha256(footer).hexdigest() != self._shard.footer_sha256:
            raise self._error("its footer is not the one that its manifest vouches for")
        return pq.read_metadata(pa.BufferReader(MAGIC + footer))

    def _check_schema(self, dtype: str) -> None:
        rows, schema = self._metadata.num_rows, self._metadata.schema.to_arrow_schema()
        found = f"{schema.names[0]} {schema.types[0]}" if len(schema) == 1 else str(schema.names)
        if found != f"{COLUMN} {dtype}":
            raise self._error(f"its columns are {found}, its manifest says {COLUMN} {dtype}")
        if rows != self._shard.tokens:
            raise self._error(f"{rows} rows, its manifest says {self._shard.tokens} tokens")

    def _read_digests(self, count: int) -> bytes:
        try:
            digests = base64.b64decode((self._metadata.metadata or {}).get(DIGESTS, b""))
        except ValueError:
            digests = b""
        if len(digests) != count * DIGEST_BYTES:
            raise self._error(f"it has no digests of its {count} row groups")
        return digests

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop).

        Raises:
            DataError: a row group, which the error names, is damaged or cannot be read.
        """
        size = self._row_group_tokens
        first, last = start // size, -(-stop // size)
        begin = self._chunks[first][0]
        end = sum(self._chunks[last - 1])
        try:
            raw = self._input.read_at(end - begin, begin)
        except (OSError, ValueError) as e:
            raise self._error(f"row groups {first} to {last - 1} cannot be read ({e})") from None
        view = memoryview(raw)
        for index in range(first, last):
            offset, length = self._chunks[index]
            if digest_of(view[offset - begin : offset - begin + length]) != self._digests[index]:
                raise self._error(
                    f"row group {index} is damaged: its sha256 is not the one in the footer",
                )
        source = pa.PythonFile(_Piece(raw, begin, self._shard.size), mode="r")
        with pq.ParquetFile(source, metadata=self._metadata) as file:
            table = file.read_row_groups(list(range(first, last)), use_threads=False)
        tokens = table[COLUMN].to_numpy()
        return tokens[start - first * size : stop - first * size]

    def _error(self, reason: str) -> DataError:
        return DataError(
            f"{self.file}: {reason}. Not trained on; restore the file, or delete "
            f"{self.file.rpartition('/')[0]} to prepare the data again"
        )


class _Piece(io.RawIOBase):
    """The bytes of a file from an offset on, read as if they were the whole file.

    So the row groups that are decoded are the very bytes that were checked.
    """

    def __init__(self, data: bytes, offset: int, size: int):
        super().__init__()
        self._data, self._offset, self._size, self._at = data, offset, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        start = self._at - self._offset
        piece = self._data[start : start + count] if count >= 0 else self._data[start:]
        self._at += len(piece)
        return piece

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@functools.lru_cache(maxsize=64)
def open_shard(path: str, shard: Shard, dtype: str, row_group_tokens: int) -> ShardReader:
    """Opens a shard and checks its footer, only once; a shard with new contents is opened again."""
    return ShardReader(path, shard, dtype, row_group_tokens)


def split_tokens(manifest: Manifest, split: str, limit: int | None = None) -> np.ndarray:
    """The first `limit` tokens of a split (all if it is None), in the order of the shards.

    Raises:
        DataError: a shard is missing or damaged.
    """
    pieces = []
    for shard in manifest.split(split):
        count = shard.tokens if limit is None else min(shard.tokens, limit)
        if count <= 0:
            break
        reader = open_shard(manifest.path, shard, manifest.dtype, manifest.row_group_tokens)
        pieces.append(reader.read(0, count))
        limit = None if limit is None else limit - count
    return np.concatenate(pieces)


def tokens_at(manifest: Manifest, split: str, places: np.ndarray) -> np.ndarray:
    """The tokens at these places, (N,), of a split in the order of its shards. Reads only the row
    groups that have them, each one once.

    Raises:
        DataError: a shard is missing or damaged.
    """
    size = manifest.row_group_tokens
    groups = [
        (shard, start, min(start + size, shard.tokens))
        for shard in manifest.split(split)
        for start in range(0, shard.tokens, size)
    ]
    ends = np.cumsum([stop - start for _, start, stop in groups])
    group_of = np.searchsorted(ends, places, side="right")
    found = np.empty(places.shape, dtype=manifest.dtype)
    for index in np.unique(group_of).tolist():
        shard, start, stop = groups[index]
        reader = open_shard(manifest.path, shard, manifest.dtype, manifest.row_group_tokens)
        is_here = group_of == index
        found[is_here] = reader.read(start, stop)[places[is_here] - (ends[index] - (stop - start))]
    return found


def documents(manifest: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yields the tokens of each document of a shard, without its end-of-text token.

    Raises:
        DataError: the shard is missing or damaged.
    """
    tokens = tokens_of(manifest, shard)
    start = 0
    for end in np.flatnonzero(tokens == manifest.eot).tolist():
        yield tokens[start:end]
        start = end + 1


def tokens_of(manifest: Manifest, shard: Shard) -> np.ndarray:
    """All tokens of a shard, (T,). Raises DataError if it is missing or damaged."""
    reader = open_shard(manifest.path, shard, manifest.dtype, manifest.row_group_tokens)
    return reader.read(0, shard.tokens)


def verify(manifest: Manifest, *, full: bool, splits: tuple[str, ...] = SPLITS) -> None:
    """Checks that every shard is there and matches the manifest.

    This compares size, footer, row count and dtype, and, if `full`, the sha256 of all bytes.

    Raises:
        DataError: a shard is missing or does not match; names up to three and counts the rest.
    """

    def problem(shard: Shard) -> str | None:
        try:
            ShardReader(manifest.path, shard, manifest.dtype, manifest.row_group_tokens)
            if full:
                file = storage.join(manifest.path, shard.file)
                storage.check_file(file, shard.size, shard.sha256, DataError)
        except DataError as e:
            return str(e)
        return None

    with ThreadPoolExecutor(8) as pool:
        wanted = [shard for shard in manifest.shards if shard.split in splits]
        found = [p for p in pool.map(problem, wanted) if p is not None]
    if found:
        raise DataError(named(found, most=3, between="; "))
