"""The documents in files of every kind, and large files cut into pieces.

A piece is read by itself, from its own place in the file. Its documents depend only on the file and
the piece, so it does not matter which pieces are read together.
"""

import codecs
import functools
import io
from collections.abc import Iterable, Iterator

from manta.text import files, parquet, records, rows, tables, unicode
from manta.text.files import END, JSONL, PARQUET, PLAIN_JSONL, TEXT, Piece, is_blank, kind
from manta.text.rows import BadRow, BadRows, Reading


def cut(path: str, size: int, cut_bytes: int, range_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file, each with its number of bytes. A file is one piece unless it is large
    and can be read from anywhere.

    Raises:
        DataError: a large file is damaged, or in an unknown encoding.
    """
    if size <= range_bytes:
        return [(Piece(path), size)]
    if kind(path) in PARQUET:
        return parquet.row_groups(path, size, range_bytes)
    is_cut = kind(path) in PLAIN_JSONL or (cut_bytes and kind(path) in TEXT)
    if is_cut and files.encoding(path) == unicode.UTF8:
        starts = range(0, size, range_bytes)
        found = [(Piece(path, i, i + range_bytes), range_bytes) for i in starts[:-1]]
        return [*found, (Piece(path, starts[-1]), size - starts[-1])]
    return [(Piece(path), size)]


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


def read(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the piece's documents, including empty ones. Bad rows go to `bad`.

    Raises:
        DataError: the file is missing or damaged, or a row is bad and not skipped.
    """
    with files.named_errors(piece.path):
        if reading.kind != "text" and files.kind(piece.path, files.TABLES):
            yield from tables.read(piece, reading, bad)
        elif reading.kind != "text" and files.kind(piece.path, files.LISTS):
            yield from _json_list(piece, reading, bad)
        elif kind(piece.path) in PARQUET:
            yield from parquet.texts(piece, reading, bad)
        elif kind(piece.path) in JSONL:
            yield from _jsonl(piece, reading, bad)
        else:
            yield from _plain_text(piece, reading, bad)


# --- JSONL ---------------------------------------------------------------------------------------


def _jsonl(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    most = reading.most_bytes
    with files.opened(piece, reading.errors) as file:
        start = _first_line(file, piece)
        for offset, line in files.lines(file, start, piece.stop, most):
            try:
                if len(line) > most:
                    raise rows.too_large(f"a line of more than {most:,} bytes", reading)
                data = rows.text_of_bytes(line, reading, offset)
                if not offset:
                    data = data.removeprefix("\ufeff")
                if data and not data.isspace():
                    yield _text(data, reading)
            except BadRow as e:
                bad.add(e, piece.path, functools.partial(_line, piece.path, offset))


def _text(data: str, reading: Reading) -> str:
    if reading.kind != "text":
        return records.text_of_row(rows.object_of_json(data), reading)
    return rows.text_of_json(data, reading)


def _json_list(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the rows of a file that is one JSON list of rows, each as one text; of another file,
    those of its lines."""
    with files.opened(piece, reading.errors) as file:
        data = file.read(reading.most_bytes + 1)
    if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _jsonl(piece, reading, bad)
        return
    try:
        if len(data) > reading.most_bytes:
            raise rows.too_large(f"a list of more than {reading.most_bytes:,} bytes", reading)
        text = rows.text_of_bytes(data, reading).removeprefix("\ufeff")
        found = rows.value_of_json(text)
    except BadRow as e:
        bad.add(e, piece.path, lambda: piece.path)
        return
    for number, row in enumerate(found, 1):
        try:
            if not isinstance(row, dict):
                shown = rows.described(row)
                raise BadRow("not an object", f"{shown}, but a row is a JSON object", "fix it")
            yield records.text_of_row(row, reading)
        except BadRow as e:
            bad.add(e, piece.path, functools.partial("{}, row {}".format, piece.path, number))


def _line(path: str, offset: int) -> str:
    return f"{path}, line {files.line_number(path, offset)}"


def _first_line(file: io.BufferedReader, piece: Piece) -> int:
    """The offset of the first line that begins in the piece; at least its stop if none does."""
    if not piece.start:
        return 0
    file.seek(piece.start - 1)  # this byte ends a line, or is within one that began earlier
    return piece.start - 1 + len(file.readline(piece.stop - piece.start + 1))


# --- plain text ----------------------------------------------------------------------------------


def _plain_text(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the piece as one document, or cut where paragraphs begin. The file is read as a
    stream, so that a piece may be of any length."""
    most = reading.most_bytes
    with files.opened(piece, reading.errors) as file:
        start = _first_paragraph(file, piece, most)
        if start is None:
            return
        document = _Document(piece.path, start, reading, bad)
        began: int | None = None  # the first line with text: blank lines alone are no document
        after_blank = False
        for offset, line in files.lines(file, start, END, most):
            blank = is_blank(offset, line, most)
            if after_blank and not blank:
                if offset >= piece.stop:
                    if began is not None:  # else the piece is all blank, but the file is not
                        yield from document.text()
                    return
                if reading.cut_bytes and began is not None and offset - began >= reading.cut_bytes:
                    yield from document.text()
                    document, began = _Document(piece.path, offset, reading, bad), None
            document.add(line)
            if began is None and not blank:
                began = offset
            after_blank = blank
        yield from document.text()


class _Document:
    """A document of plain text, while its lines are read; it begins at `offset` in the file."""

    def __init__(self, path: str, offset: int, reading: Reading, bad: BadRows):
        self._path, self._offset, self._reading, self._bad = path, offset, reading, bad
        self._held = bytearray()
        self._is_bad = False

    def add(self, line: bytes) -> None:
        if self._is_bad:
            return
        if len(self._held) + len(line) > self._reading.most_bytes:
            most = self._reading.most_bytes
            self._refuse(rows.too_large(f"a document of more than {most:,} bytes", self._reading))
        else:
            self._held += line

    def _refuse(self, problem: BadRow) -> None:
        self._is_bad = True
        self._held.clear()
        self._bad.add(problem, self._path, self._place)

    def _place(self) -> str:
        if not self._offset:
            return self._path
        return f"{self._path}, from line {files.line_number(self._path, self._offset)}"

    def text(self) -> Iterator[str]:
        """Yields the text; nothing if the document is a bad row that is skipped."""
        if self._is_bad:
            return
        try:
            text = rows.text_of_bytes(self._held, self._reading, self._offset)
        except BadRow as e:
            self._refuse(e)
            return
        yield text if self._offset else text.removeprefix("\ufeff")


def _first_paragraph(file: io.BufferedReader, piece: Piece, most: int) -> int | None:
    """The offset where the piece's text begins: its first line with text after a blank line, or the
    start of the file. None if no paragraph begins between its start and its stop."""
    if not piece.start:
        return 0
    at = _before(file, piece.start, most)
    file.seek(at)
    after_blank = False
    while at < piece.stop and (line := file.readline(piece.stop - at)):  # a line may be very long
        if after_blank and at >= piece.start:
            if not line.endswith(b"\n"):
                line += file.readline(most + 1)
            if not is_blank(at, line, most):
                return at
        after_blank = is_blank(at, line, most)
        at += len(line)
    return None


def _before(file: io.BufferedReader, start: int, most: int) -> int:
    """An offset before `start`. Reading from there shows whether the line before `start` is blank:
    the offset is in an earlier line, or in that line with some of its text after it, or more than
    `most` bytes of it."""
    back = 256
    while True:
        at = max(0, start - back)
        file.seek(at)
        behind = file.read(start - at)
        if at == 0 or b"\n" in behind[:-1] or back > most:
            return at
        if behind.decode(errors="ignore").strip():  # both ends may cut a character
            return at
        back = min(16 * back, most + 1)
