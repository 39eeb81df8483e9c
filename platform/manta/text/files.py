"""Documents in files: JSONL, Parquet and plain text, whole files and pieces of large ones.

A piece is read by itself, from its own place in the file. Its documents depend only on the file and
the piece, so it does not matter which pieces are read together.
"""

import contextlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from manta import storage
from manta.errors import DataError

TEXT = (".txt", ".text", ".md", ".rst", ".py")
PLAIN_JSONL = (".jsonl", ".ndjson")
JSONL = (*PLAIN_JSONL, ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)
READABLE = TEXT + JSONL + PARQUET
END = sys.maxsize


class Piece(NamedTuple):
    """A range of a file, from `start` up to `stop`: row groups of a Parquet file, bytes of another
    file. A range of bytes has the JSONL lines (in plain text: paragraphs) that begin in it."""

    path: str
    start: int = 0
    stop: int = END


class Reading(NamedTuple):
    """How files are read; the fields are those of `sources.Source`."""

    text_key: str
    errors: str
    cut_bytes: int


def pieces(path: str, size: int, cut_bytes: int, range_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file, each with its number of bytes. A file is one piece unless it is large
    and can be read from anywhere.

    Raises:
        DataError: a large Parquet file is damaged.
    """
    if size <= range_bytes:
        return [(Piece(path), size)]
    if path.endswith(PARQUET):
        return _row_groups(path, range_bytes)
    if path.endswith(PLAIN_JSONL) or (cut_bytes and path.endswith(TEXT)):
        starts = range(0, size, range_bytes)
        found = [(Piece(path, i, i + range_bytes), range_bytes) for i in starts[:-1]]
        return [*found, (Piece(path, starts[-1]), size - starts[-1])]
    return [(Piece(path), size)]


def _row_groups(path: str, range_bytes: int) -> list[tuple[Piece, int]]:
    with _named_errors(path), _parquet_file(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [
            sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            for group in groups
        ]
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


def join(found: Iterable[Piece]) -> tuple[Piece, ...]:
    """Joins neighbouring pieces of a file, without changing the documents. Plain text stays as it
    is: there the cutting into documents starts again in each piece."""
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        if last and (last.path, last.stop) == piece[:2] and not piece.path.endswith(TEXT):
            joined[-1] = Piece(piece.path, last.start, piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)


def read(piece: Piece, reading: Reading) -> Iterator[str]:
    """Yields the piece's documents, including empty ones.

    Raises:
        DataError: the file is missing, damaged, or not UTF-8, or a row has no text.
    """
    with _named_errors(piece.path):
        if piece.path.endswith(PARQUET):
            yield from _parquet(piece, reading)
        elif piece.path.endswith(JSONL):
            yield from _jsonl(piece, reading)
        else:
            yield from _plain_text(piece, reading)


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file on this node; every node must see the corpus at the same path"
        ) from None
    except (pa.ArrowInvalid, OSError, EOFError) as e:
        raise DataError(f"{path}: cannot be read ({e}); restore the file or leave it out") from None


# --- rows ----------------------------------------------------------------------------------------


class _BadRow(Exception):
    """A row without text; the caller, who knows the row's number, adds where it is."""


def texts_of_rows(
    rows: Iterable[dict[str, object]], reading: Reading, where: str, before: int = 0
) -> Iterator[str]:
    for number, row in enumerate(rows, before + 1):
        try:
            yield _text_of(row, reading)
        except _BadRow as e:
            raise DataError(f"{where}, row {number}: {e}") from None


def _text_of(row: dict[str, object], reading: Reading) -> str:
    text = row.get(reading.text_key)
    if not isinstance(text, str):
        keys = ", ".join(map(str, row))
        raise _BadRow(f"no text under '{reading.text_key}' (it has: {keys}); set data.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair
        if reading.errors == "strict":
            raise _BadRow(
                f"not valid Unicode at character {e.start}; fix it or set data.errors=replace"
            ) from None
        text = text.encode(errors="surrogatepass").decode(errors="replace")
    return text


def _parquet(piece: Piece, reading: Reading) -> Iterator[str]:
    with _parquet_file(piece.path) as file:
        columns = file.schema_arrow.names
        if reading.text_key not in columns:
            raise DataError(
                f"{piece.path}: no column '{reading.text_key}'; it has {', '.join(columns)}: "
                "set data.text_key"
            )
        groups = range(piece.start, min(piece.stop, file.num_row_groups))
        batches = file.iter_batches(
            columns=[reading.text_key], batch_size=256, row_groups=list(groups)
        )
        rows = (row for batch in batches for row in batch.to_pylist())
        before = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        yield from texts_of_rows(rows, reading, piece.path, before)


@contextlib.contextmanager
def _parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    fs, inside = storage.filesystem(path)
    with fs.open_input_file(inside) as opened, pq.ParquetFile(opened) as file:
        yield file


def _jsonl(piece: Piece, reading: Reading) -> Iterator[str]:
    with _opened(piece) as file:
        start = _first_line(file, piece)
        for offset, line in _lines(file, piece.path, start, piece.stop, reading.errors):
            if line.isspace():
                continue
            try:
                yield _text_of(_object(line), reading)
            except _BadRow as e:
                number = _line_number(piece.path, offset)
                raise DataError(f"{piece.path}, line {number}: {e}") from None


def _object(line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise _BadRow(f"not valid JSON ({e})") from None
    if not isinstance(row, dict):
        raise _BadRow("a JSON object is needed on each line")
    return row


def _first_line(file: io.BufferedReader, piece: Piece) -> int:
    """The offset of the first line that begins in the piece; at least its stop if none does."""
    if not piece.start:
        return 0
    file.seek(piece.start - 1)  # this byte ends a line, or is within one that began earlier
    return piece.start - 1 + len(file.readline(piece.stop - piece.start + 1))


def _line_number(path: str, offset: int) -> int:
    """The number, from 1, of the line that begins at `offset`; counted only for a message."""
    number = 1
    with _opened(Piece(path)) as file:
        while chunk := file.read(min(offset, storage.CHUNK_BYTES)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


# --- plain text ----------------------------------------------------------------------------------


def _plain_text(piece: Piece, reading: Reading) -> Iterator[str]:
    """Yields the piece as one document, or cut where paragraphs begin. The file is read as a
    stream, so that a piece may be of any length."""
    with _opened(piece) as file:
        start = _first_paragraph(file, piece)
        if start is None:
            return
        held: list[str] = []
        began: int | None = None  # the first line with text: blank lines alone are no document
        after_blank = False
        for offset, line in _lines(file, piece.path, start, END, reading.errors):
            blank = line.isspace()
            if after_blank and not blank:
                if offset >= piece.stop:
                    if began is not None:  # else the piece is all blank, but the file is not
                        yield "".join(held)
                    return
                if reading.cut_bytes and began is not None and offset - began >= reading.cut_bytes:
                    yield "".join(held)
                    held, began = [], None
            held.append(line)
            if began is None and not blank:
                began = offset
            after_blank = blank
        yield "".join(held)


def _first_paragraph(file: io.BufferedReader, piece: Piece) -> int | None:
    """The offset where the piece's text begins: its first line with text after a blank line, or the
    start of the file. None if no paragraph begins between its start and its stop."""
    if not piece.start:
        return 0
    at = _before(file, piece.start)
    file.seek(at)
    after_blank = False
    while at < piece.stop and (line := file.readline(piece.stop - at)):  # a line may be very long
        if after_blank and at >= piece.start:
            if not line.endswith(b"\n"):
                line += file.readline()
            if not _is_blank(line):
                return at
        after_blank = _is_blank(line)
        at += len(line)
    return None


def _before(file: io.BufferedReader, start: int) -> int:
    """An offset before `start`. Reading from there shows whether the line before `start` is blank:
    the offset is in an earlier line, or in that line with some of its text after it."""
    back = 256
    while True:
        at = max(0, start - back)
        file.seek(at)
        behind = file.read(start - at)
        if at == 0 or b"\n" in behind[:-1]:
            return at
        if behind.decode(errors="ignore").strip():  # both ends may cut a character
            return at
        back *= 16


def _is_blank(line: bytes) -> bool:
    return line.decode(errors="replace").isspace()


# --- lines ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(piece: Piece) -> Iterator[io.BufferedReader]:
    """Opens the file, and decompresses it if its name's ending says so. It is seekable if the piece
    begins inside the file (pieces of compressed files never do)."""
    fs, inside = storage.filesystem(piece.path)
    if piece.start:
        opened = fs.open_input_file(inside)
    else:
        opened = fs.open_input_stream(inside, compression="detect")
    with opened, io.BufferedReader(opened, storage.CHUNK_BYTES) as file:
        yield file


def _lines(
    file: io.BufferedReader, path: str, start: int, stop: int, errors: str
) -> Iterator[tuple[int, str]]:
    """Yields (offset, text) of the lines that begin from `start`, where one begins, up to `stop`.
    Line ends are kept. Only a line feed ends a line, so that no character is cut."""
    if start >= stop:  # `start` may be within a very long line
        return
    if start:
        file.seek(start)
    offset = start
    for raw in file:
        if offset >= stop:
            return
        try:
            line = raw.decode(errors=errors)
        except UnicodeDecodeError as e:
            raise DataError(
                f"{path}: not UTF-8 at byte {offset + e.start} (0x{raw[e.start]:02x}); "
                "convert the file or set data.errors=replace"
            ) from None
        yield offset, line
        offset += len(raw)
