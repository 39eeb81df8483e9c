"""Rows of CSV and TSV files, with or without a header.

In a CSV file, a field may be in double quotes, and then have commas, line ends and doubled quotes
in it (RFC 4180). In a TSV file, a quote is a character like any other (as IANA registered the
format), so that texts with an odd number of quotes stay whole; `quotes=double` reads its fields as
those of a CSV.
"""

import csv
import functools
import io
from collections.abc import Iterator
from typing import NamedTuple

from manta import foreign
from manta.errors import DataError
from manta.text import files, labels
from manta.text.files import END, Piece
from manta.text.rows import BadRow, BadRows, Reading

HEADERLESS = ("label", "text")


class Columns(NamedTuple):
    """The names of a file's columns, and whether its first line has them."""

    names: tuple[str, ...]
    in_header: bool


def read(piece: Piece, reading: Reading, bad: BadRows) -> Iterator[str]:
    """Yields the labelled texts of a file, as `labels.text_of_row` makes them. Bad rows go to
    `bad`.

    Raises:
        DataError: a row is bad and not skipped, it is not known which columns have text and label,
            or a quote is not closed, so that it is not known where rows end.
    """
    with files.opened(piece, reading.errors) as file:
        lines = _Lines(file, piece.path, reading)
        columns: Columns | None = None
        for number, fields in _records(lines, reading, bad):
            if columns is None:
                columns = columns_of(fields, piece.path, reading)
                if columns.in_header:
                    continue
            try:
                if len(fields) != len(columns.names):
                    raise _uneven(fields, columns)
                row = dict(zip(columns.names, fields, strict=True))
                yield labels.text_of_row(row, reading)
            except BadRow as e:
                bad.add(e, piece.path, functools.partial("{}, line {}".format, piece.path, number))


def note(path: str, reading: Reading) -> str | None:
    """A line about a file without a header; None if it has one.

    Raises:
        DataError: it is not known which columns have text and label.
    """
    with files.named_errors(path), files.opened(Piece(path), reading.errors) as file:
        for _, fields in _records(_Lines(file, path, reading), reading, BadRows("skip")):
            columns = columns_of(fields, path, reading)
            if columns.in_header:
                return None
            return (
                f"{path}: no header that names '{reading.text_key}', so its columns are "
                f"{' and '.join(columns.names)}, from its first line on"
            )
    return None


def columns_of(first: list[str], path: str, reading: Reading) -> Columns:
    """The columns of a file with this first record. Raises DataError if they are not known."""
    wanted = {reading.text_key, reading.label_key}
    if reading.text_key in first and (
        reading.label_key in first or reading.kind == labels.TO_CLASSIFY
    ):
        for name in wanted:
            if first.count(name) > 1:
                raise DataError(f"{path}: {first.count(name)} columns are named '{name}'")
        return Columns(tuple(first), True)
    if wanted == set(HEADERLESS):
        if len(first) == 2:
            return Columns(HEADERLESS, False)
        if len(first) == 1 and reading.kind == labels.TO_CLASSIFY:
            return Columns(("text",), False)
    has = foreign.line(", ".join(map(repr, first)))
    raise DataError(
        f"{path}: its first line does not name the columns '{reading.label_key}' and "
        f"'{reading.text_key}' (it has {len(first)} columns: {has}); set data.label_key and "
        "data.text_key to names in it; without a header, a file has two columns, label and text"
    )


class _Lines(Iterator[str]):
    """The lines of a file as text, counted. Bytes that are not UTF-8 are kept as surrogates, which
    `labels.text_of_row` finds: the quotes after them have to be read in any case."""

    def __init__(self, file: io.BufferedReader, path: str, reading: Reading):
        self.path, self._most = path, reading.most_bytes
        self._errors = "surrogateescape" if reading.errors == "strict" else "replace"
        self._lines = files.lines(file, 0, END, self._most)
        self.number = 0
        """The number of the line that was read last, from 1."""

    def __next__(self) -> str:
        offset, line = next(self._lines)
        self.number += 1
        if len(line) > self._most:
            raise DataError(
                f"{self.path}, line {self.number}: more than {self._most:,} bytes; raise "
                "data.max_document_bytes or shorten the text"
            )
        text = line.decode(errors=self._errors)
        return text if offset else text.removeprefix("\ufeff")


def _records(lines: _Lines, reading: Reading, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Yields the fields of each record that is not blank, with the number of its first line."""
    is_tsv = ".tsv" in lines.path.lower().rpartition("/")[2]
    quotes = reading.quotes if reading.quotes != "auto" else "none" if is_tsv else "double"
    csv.field_size_limit(reading.most_bytes)
    parser = csv.reader(
        lines,
        delimiter="\t" if is_tsv else ",",
        quoting=csv.QUOTE_NONE if quotes == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    while True:
        first = lines.number + 1
        try:
            fields = next(parser)
        except StopIteration:
            return
        except csv.Error as e:
            what = foreign.line(str(e))
            place = functools.partial("{}, line {}".format, lines.path, first)
            if lines.number > first or "unexpected end" in what:
                raise DataError(
                    f"{place()}: a quote that opens there is not closed as CSV has it ({what}), so "
                    "that rows cannot be told apart; double the quotes within a quoted field, or "
                    "set data.quotes=none if quotes are part of the texts"
                ) from None
            problem = BadRow("not CSV", f"not CSV ({what})", "fix it, or set data.quotes=none")
            bad.add(problem, lines.path, place)
            continue
        if any(fields):
            yield first, fields


def _uneven(fields: list[str], columns: Columns) -> BadRow:
    known = "its first line has" if columns.in_header else "there are"
    is_quoted = any(field.startswith('"') for field in fields)
    return BadRow(
        "other columns",
        f"{len(fields)} columns, where {known} {len(columns.names)}",
        "fix it, or set data.quotes=double if its fields are quoted" if is_quoted else "fix it",
    )
