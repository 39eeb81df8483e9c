"""Files of documents: their kinds, and their lines as UTF-8, of bounded length."""

import codecs
import contextlib
import io
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from manta import foreign, storage
from manta.errors import DataError
from manta.text import unicode

TEXT = (".txt", ".text", ".md", ".rst", ".py")
PLAIN_JSONL = (".jsonl", ".ndjson")
JSONL = (*PLAIN_JSONL, ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)
READABLE = TEXT + JSONL + PARQUET
LISTS = (".json", ".json.gz", ".json.zst")  # one JSON list of rows, or JSONL
ROWS = (".json", ".json.zst", *JSONL, *PARQUET)  # what conversations are read from
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
LABELLED = (*TABLES, *ROWS)  # what labelled texts are read from
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
END = sys.maxsize


class Piece(NamedTuple):
    """A range of a file, from `start` up to `stop`: row groups of a Parquet file, bytes of another
    file. A range of bytes has the JSONL lines (in plain text: paragraphs) that begin in it."""

    path: str
    start: int = 0
    stop: int = END


def kind(path: str, readable: tuple[str, ...] = READABLE) -> str | None:
    """The ending of a readable file's name, in lower case; None if files of its kind are not
    read."""
    return next((ending for ending in readable if path.lower().endswith(ending)), None)


def compression(path: str) -> str | None:
    """How a file is compressed, by its name."""
    return COMPRESSIONS.get("." + path.lower().rpartition(".")[2])


def what_is(path: str) -> str:
    """The kind of a local thing that is neither a file nor a folder."""
    mode = Path(storage.filesystem(path)[1]).stat().st_mode
    return SPECIAL.get(stat.S_IFMT(mode), "no file")


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Makes a DataError that names the file of what goes wrong while it is read."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file on this node; every node must see the corpus at the same path"
        ) from None
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as e:
        if isinstance(e, UnicodeDecodeError) and e.encoding != unicode.UTF8:
            raise DataError(
                f"{path}: not {e.encoding.upper()}, which its byte-order mark names ({e.reason}); "
                "convert the file or set data.errors=replace"
            ) from None
        reason = foreign.line(str(e))  # UTF-8 that is damaged is in the footer: rows have messages
        raise DataError(
            f"{path}: cannot be read ({reason}); restore the file or leave it out"
        ) from None


def refuse_special(path: str) -> None:
    """Raises DataError if a local path is no file: a pipe would be waited for, and a device may
    have no end."""
    if storage.is_local(path):
        inside = Path(storage.filesystem(path)[1])
        if not inside.is_file() and inside.exists():
            what = "a folder" if inside.is_dir() else what_is(path)
            raise DataError(f"{path}: {what}, where a file was; restore it or leave it out")


@contextlib.contextmanager
def opened(piece: Piece, errors: str) -> Iterator[io.BufferedReader]:
    """Opens the file, decompresses it if its name's ending says so, and makes UTF-8 of UTF-16. It
    is seekable if the piece begins inside the file (pieces of such files never do)."""
    refuse_special(piece.path)
    fs, inside = storage.filesystem(piece.path)
    if piece.start:
        found = fs.open_input_file(inside)
    else:
        found = fs.open_input_stream(inside, compression=compression(piece.path))
    with found, io.BufferedReader(found, storage.CHUNK_BYTES) as file:
        if not piece.start:
            encoding = unicode.encoding_of(file.peek(unicode.HEAD_BYTES), piece.path)
            if encoding != unicode.UTF8:
                recoded = unicode.AsUtf8(file, encoding, errors)
                with io.BufferedReader(recoded, storage.CHUNK_BYTES) as as_utf8:
                    yield as_utf8  # type: ignore[misc]
                return
        yield file


def encoding(path: str) -> str:
    """The encoding of a file that is not compressed."""
    with named_errors(path):
        refuse_special(path)
        fs, inside = storage.filesystem(path)
        with fs.open_input_stream(inside, compression=None) as file:
            return unicode.encoding_of(file.read(unicode.HEAD_BYTES), path)


def lines(file: io.BufferedReader, start: int, stop: int, most: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of the lines that begin from `start`, where one begins, up to `stop`.

    Line ends are kept, and so is the byte-order mark of the file. Only a line feed ends a line, so
    that no character is cut. Of a line that is longer than `most` bytes, the first `most + 1` are
    there: whoever wants all of them can see that they are not.
    """
    if start >= stop:  # `start` may be within a very long line
        return
    if start:
        file.seek(start)
    offset = start
    while offset < stop and (line := file.readline(most + 1)):
        yield offset, line
        offset += len(line)
        while not line.endswith(b"\n") and (line := file.readline(storage.CHUNK_BYTES)):
            offset += len(line)


def is_blank(offset: int, line: bytes, most: int) -> bool:
    """Whether a line has only white space; one that is longer than `most` bytes counts as text."""
    if len(line) > most:
        return False
    if not offset:
        line = line.removeprefix(codecs.BOM_UTF8)
    if line and 0x20 < line[0] < 0x7F:  # as most lines begin
        return False
    return line.decode(errors="replace").isspace()


def line_number(path: str, offset: int) -> int:
    """The number, from 1, of the line that begins at `offset`; counted only for a message."""
    number = 1
    with opened(Piece(path), "replace") as file:
        while chunk := file.read(min(offset, storage.CHUNK_BYTES)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number
