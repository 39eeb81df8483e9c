"""Documents in files: JSONL, Parquet and plain text, whole files and pieces of large ones.

A piece is read by itself, from its own place in the file. Its documents depend only on the file and
the piece, so it does not matter which pieces are read together.
"""

import codecs
import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from manta import storage
from manta.errors import DataError
from manta.text import unicode

TEXT = (".txt", ".text", ".md", ".rst", ".py")
PLAIN_JSONL = (".jsonl", ".ndjson")
JSONL = (*PLAIN_JSONL, ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)
READABLE = TEXT + JSONL + PARQUET
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
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


def kind(path: str) -> str | None:
    """The ending of a readable file's name, in lower case; None if files of its kind are not
    read."""
    return next((ending for ending in READABLE if path.lower().endswith(ending)), None)


def compression(path: str) -> str | None:
    """How a file is compressed, by its name."""
    return COMPRESSIONS.get("." + path.lower().rpartition(".")[2])


def pieces(path: str, size: int, cut_bytes: int, range_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file, each with its number of bytes. A file is one piece unless it is large
    and can be read from anywhere.

    Raises:
        DataError: a large file is damaged, or in an unknown encoding.
    """
    if size <= range_bytes:
        return [(Piece(path), size)]
    if kind(path) in PARQUET:
        return _row_groups(path, range_bytes)
    is_cut = kind(path) in PLAIN_JSONL or (cut_bytes and kind(path) in TEXT)
    if is_cut and _encoding(path) == unicode.UTF8:
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
        if last and (last.path, last.stop) == piece[:2] and kind(piece.path) not in TEXT:
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
        if kind(piece.path) in PARQUET:
            yield from _parquet(piece, reading)
        elif kind(piece.path) in JSONL:
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
    except UnicodeDecodeError as e:  # UTF-8 has a message of its own, with the place in the file
        raise DataError(
            f"{path}: not {e.encoding.upper()}, which its byte-order mark names ({e.reason}); "
            "convert the file or set data.errors=replace"
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
        refuse_namesakes([c for c in columns if c == reading.text_key], piece.path)
        groups = range(piece.start, min(piece.stop, file.num_row_groups))
        batches = file.iter_batches(
            columns=[reading.text_key], batch_size=256, row_groups=list(groups)
        )
        rows = (row for batch in batches for row in batch.to_pylist())
        before = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        yield from texts_of_rows(rows, reading, piece.path, before)


def refuse_namesakes(columns: list[str], path: str) -> None:
    """Raises DataError if two columns have one name: one of them would be ignored."""
    for name, count in Counter(columns).items():
        if count > 1:
            raise DataError(f"{path}: {count} columns are named '{name}'; rename all but one")


@contextlib.contextmanager
def _parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    fs, inside = storage.filesystem(path)
    with fs.open_input_file(inside) as opened, pq.ParquetFile(opened) as file:
        yield file


def _jsonl(piece: Piece, reading: Reading) -> Iterator[str]:
    with _opened(piece, reading.errors) as file:
        start = _first_line(file, piece)
        for offset, line in _lines(file, piece.path, start, piece.stop, reading.errors):
            if line.isspace():
                continue
            try:
                yield _text_of(_object(line, reading.text_key), reading)
            except _BadRow as e:
                number = _line_number(piece.path, offset)
                raise DataError(f"{piece.path}, line {number}: {e}") from None


def _object(line: str, text_key: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise _BadRow(f"not valid JSON ({e})") from None
    if not isinstance(row, dict):
        raise _BadRow("a JSON object is needed on each line")
    if line.count(json.dumps(text_key)) > 1:  # only then is the slower look worth its time
        pairs = json.loads(line, object_pairs_hook=list)
        if [key for key, _ in pairs].count(text_key) > 1:
            raise _BadRow(f"'{text_key}' is there twice; leave out one of them")
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
    with _opened(Piece(path), "replace") as file:
        while chunk := file.read(min(offset, storage.CHUNK_BYTES)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


# --- plain text ----------------------------------------------------------------------------------


def _plain_text(piece: Piece, reading: Reading) -> Iterator[str]:
    """Yields the piece as one document, or cut where paragraphs begin. The file is read as a
    stream, so that a piece may be of any length."""
    with _opened(piece, reading.errors) as file:
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
        after_blank = _is_blank(line if at else line.removeprefix(codecs.BOM_UTF8))
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
def _opened(piece: Piece, errors: str) -> Iterator[io.BufferedReader]:
    """Opens the file, decompresses it if its name's ending says so, and makes UTF-8 of UTF-16. It
    is seekable if the piece begins inside the file (pieces of such files never do)."""
    fs, inside = storage.filesystem(piece.path)
    if piece.start:
        opened = fs.open_input_file(inside)
    else:
        opened = fs.open_input_stream(inside, compression=compression(piece.path))
    with opened, io.BufferedReader(opened, storage.CHUNK_BYTES) as file:
        if not piece.start:
            encoding = unicode.encoding_of(file.peek(unicode.HEAD_BYTES), piece.path)
            if encoding != unicode.UTF8:
                recoded = unicode.AsUtf8(file, encoding, errors)
                with io.BufferedReader(recoded, storage.CHUNK_BYTES) as as_utf8:
                    yield as_utf8  # type: ignore[misc]
                return
        yield file


def _encoding(path: str) -> str:
    """The encoding of a file that is not compressed."""
    fs, inside = storage.filesystem(path)
    with _named_errors(path), fs.open_input_stream(inside, compression=None) as file:
        return unicode.encoding_of(file.read(unicode.HEAD_BYTES), path)


def _lines(
    file: io.BufferedReader, path: str, start: int, stop: int, errors: str
) -> Iterator[tuple[int, str]]:
    """Yields (offset, text) of the lines that begin from `start`, where one begins, up to `stop`.
    Line ends are kept; the byte-order mark of the file is dropped. Only a line feed ends a line, so
    that no character is cut."""
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
        if not offset:
            line = line.removeprefix("\ufeff")
        if line:
            yield offset, line
        offset += len(raw)
