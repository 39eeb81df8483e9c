"""Documents in Parquet files, one row at a time.

A value can be stored once and repeated in many rows, so a file of a few kB can hold many GB: only
one row's text is in memory, with the page of the file that it is in (of at most 2 GiB, as Parquet
says).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from manta import foreign, storage
from manta.errors import DataError
from manta.text import files, records, rows
from manta.text.files import END, Piece
from manta.text.rows import BadRow, BadRows, Reading

# In a column that is read as indices into a dictionary, many rows take the memory of one.
DICTIONARY_ROWS = 256


@contextlib.contextmanager
def opened(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a file so that its columns are read page by page, not as a whole."""
    files.refuse_special(path)
    fs, inside = storage.filesystem(path)
    with (
        fs.open_input_file(inside) as found,
        pq.ParquetFile(
            found,
            buffer_size=storage.CHUNK_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file,
    ):
        yield file


def batches(
    file: pq.ParquetFile, columns: list[str] | None = None, groups: list[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of some columns and row groups (None: of all), in batches that take no more memory
    than one row does."""
    kinds = [field.type for field in file.schema_arrow if not columns or field.name in columns]
    return file.iter_batches(
        columns=columns,
        batch_size=DICTIONARY_ROWS if any(map(pa.types.is_dictionary, kinds)) else 1,
        row_groups=groups,
        use_threads=False,  # to hand one row to a thread takes longer than to read it
    )


def row_groups(path: str, size: int, range_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file of `size` bytes, of about `range_bytes` each, with their numbers of
    bytes. A row group counts by its share of the unpacked bytes.

    Raises:
        DataError: the file is damaged.
    """
    with files.named_errors(path), opened(path) as file:
        # The library ends the process if it is asked for the sizes of columns in a damaged footer.
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        unpacked = [max(group.total_byte_size, 1) for group in groups]
    sizes = [max(size * own // sum(unpacked), 1) for own in unpacked]
    starts = [0]
    held = 0
    for i, group_size in enumerate(sizes):
        if held and held + group_size > range_bytes:
            starts.append(i)
            held = 0
        held += group_size
    stops = [*starts[1:], END]
    return [
        (Piece(path, start, stop), sum(sizes[start:stop]))
        for start, stop in zip(starts, stops, strict=True)
    ]


def refuse_namesakes(columns: list[str], path: str) -> None:
    """Raises DataError if two columns have one name: one of them would be ignored."""
    for name, count in Counter(columns).items():
        if count > 1:
            named = foreign.line(name)
            raise DataError(f"{path}: {count} columns are named '{named}'; rename all but one")


def texts(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the texts of the piece's rows. Raises DataError if a row has none, or the file is
    damaged."""
    path, key = piece.path, reading.text_key
    if reading.kind != "text":
        yield from _records(piece, reading, bad)
        return
    with opened(path) as file:
        columns = file.schema_arrow.names
        refuse_namesakes([c for c in columns if c == key], path)
        groups = range(piece.start, min(piece.stop, file.num_row_groups))
        counts = [max(file.metadata.row_group(i).num_rows, 0) for i in groups]
        problem = _problem_of_column(file.schema_arrow, reading)
        if problem is not None:
            if sum(counts) or not bad.skips:
                bad.add(problem, path, lambda: path, sum(counts))
            return
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        for batch in batches(file, [key], list(groups)):
            for value in batch.column(batch.schema.get_field_index(key)):
                row += 1
                try:
                    yield text_of_scalar(value, reading)
                except BadRow as e:
                    bad.add(e, path, lambda number=row: f"{path}, row {number}")  # type: ignore[misc]


def _records(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the piece's rows, each as one text."""
    path = piece.path
    with opened(path) as file:
        refuse_namesakes(file.schema_arrow.names, path)
        groups = list(range(piece.start, min(piece.stop, file.num_row_groups)))
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        for batch in batches(file, groups=groups):
            for index in range(batch.num_rows):
                row += 1
                try:
                    yield record_of(batch.slice(index, 1), reading)
                except BadRow as e:
                    bad.add(e, path, lambda number=row: f"{path}, row {number}")  # type: ignore[misc]


def record_of(table: pa.RecordBatch | pa.Table, reading: Reading) -> str:
    """A table of one row as one text. Raises BadRow if it is not of the kind that is read."""
    if table.nbytes > reading.most_bytes:
        raise rows.too_large(f"a row of {table.nbytes:,} bytes", reading)
    try:
        (row,) = table.to_pylist()
    except UnicodeDecodeError as e:
        what = f"not UTF-8 at byte {e.start} of a text"
        raise BadRow("not UTF-8", what, "fix the row") from None
    return records.text_of_row(row, reading)


def _problem_of_column(schema: pa.Schema, reading: Reading) -> BadRow | None:
    if reading.text_key not in schema.names:
        return rows.missing(schema.names, reading)
    kind = schema.field(reading.text_key).type
    if _is_text(kind):
        return None
    is_null = pa.types.is_null(kind)
    shown = foreign.line(str(kind))
    return rows.no_text(f"a column of {shown}", reading, "null" if is_null else "not text")


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, or bytes that may be UTF-8."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    of = pa.types
    return any(
        is_kind(kind)
        for is_kind in (
            of.is_string, of.is_large_string, of.is_string_view,
            of.is_binary, of.is_large_binary, of.is_binary_view,
        )
    )  # fmt: skip


def text_of_scalar(value: pa.Scalar, reading: Reading) -> str:
    """The text in a value of any type. Raises BadRow if there is none."""
    while isinstance(value, pa.DictionaryScalar | pa.ExtensionScalar) and value.is_valid:
        value = value.value
    if not value.is_valid or not _is_text(value.type):
        return rows.text_of_value(value.as_py(), reading)
    data = value.as_buffer()  # as_py would decode it, and copy what may be too large
    if data.size > reading.most_bytes:
        raise rows.too_large(f"a text of {data.size:,} bytes", reading)
    return rows.text_of_bytes(data.to_pybytes(), reading)
