"""Rows and their texts, and what happens to rows without a usable one.

A row is a line of JSONL, a row of Parquet or of a Hugging Face dataset, or a document of plain
text.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from manta import foreign
from manta.errors import DataError

LISTED = 100  # files that are counted by name; a manifest has no room for a million of them


class Reading(NamedTuple):
    """How rows are read; the fields are those of `sources.Source`.

    kind: "text", or what a row is: "chat" (`conversations`), "preference" (`preferences`),
        "classify" or, if the label may be missing, "unlabelled" (`labels`).
    before_input: what is put between the instruction and the input of such a row.
    label_key: the key or column of the label (`labels`).
    quotes: whether quotes hold a field together in a table (`tables`).
    """

    text_key: str
    errors: str
    cut_bytes: int
    most_bytes: int
    kind: str = "text"
    before_input: str = ""
    label_key: str = "label"
    quotes: str = "auto"


class BadRow(Exception):
    """A row without a usable text.

    `kind` is what rows are counted by; `what` says what is wrong with this one, and `remedy` what a
    person can do about it. The caller, who knows where the row is, adds the place.
    """

    def __init__(self, kind: str, what: str, remedy: str):
        super().__init__(what)
        self.kind, self.what, self.remedy = kind, what, remedy


class BadRows:
    """What happens to bad rows: the first one ends the reading, or all are skipped and counted."""

    def __init__(self, on_bad_rows: str, key: str = "data.on_bad_rows"):
        assert on_bad_rows in ("fail", "skip")
        self.skips = on_bad_rows == "skip"
        self._key = key
        self.counts: dict[str, Counter[str]] = {}
        """Numbers of skipped rows by file and kind."""

    def add(self, row: BadRow, path: str, where: Callable[[], str], count: int = 1) -> None:
        """Counts `count` rows of the file at `path`.

        Args:
            where: the file and the place in it, for the message; it may take time to find out.

        Raises:
            DataError: bad rows are not to be skipped.
        """
        if not self.skips:
            raise DataError(
                f"{where()}: {row.what}; {row.remedy}, or leave such rows out with {self._key}=skip"
            )
        if count:
            self.counts.setdefault(path, Counter())[row.kind] += count


def total(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The sums of numbers of skipped rows by file and kind, for the files with most of them; those
    of all other files are under one name."""
    sums: dict[str, Counter[str]] = {}
    for found in counts:
        for path, kinds in found.items():
            sums.setdefault(path, Counter()).update(kinds)
    ordered = sorted(sums, key=lambda path: (-sums[path].total(), path))
    listed = {path: dict(sorted(sums[path].items())) for path in ordered[:LISTED]}
    if others := ordered[LISTED:]:
        rest: Counter[str] = sum((sums[path] for path in others), Counter())
        listed[f"{len(others):,} more files"] = dict(sorted(rest.items()))
    return listed


def most(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of numbers of rows by file, for the files with most of them, as `total` has them."""
    nested = total({path: {"": n} for path, n in found.items()} for found in counts)
    return {path: kinds[""] for path, kinds in nested.items()}


def line(counts: dict[str, dict[str, int]], shown: int = 3) -> str:
    """A phrase for the numbers of skipped rows, in all, by kind and by file."""
    kinds: Counter[str] = sum(map(Counter, counts.values()), Counter())
    files = [f"{path} ({_by_kind(counts[path])})" for path in list(counts)[:shown]]
    more = len(counts) - shown
    places = ", ".join(files) + (f", and {more:,} more" if more > 0 else "")
    return f"{kinds.total():,} rows without a usable text ({_by_kind(kinds)}): {places}"


def _by_kind(kinds: dict[str, int]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)


# --- texts ---------------------------------------------------------------------------------------


def text_of_bytes(data: bytes | bytearray, reading: Reading, before: int = 0) -> str:
    """The text that is UTF-8 in these bytes, before which the file has `before` others. Raises
    BadRow if they are not UTF-8."""
    try:
        return data.decode(errors=reading.errors)
    except UnicodeDecodeError as e:
        raise BadRow(
            "not UTF-8",
            f"not UTF-8 at byte {before + e.start} (0x{data[e.start]:02x})",
            "convert the file or set data.errors=replace",
        ) from None


def too_large(what: str, reading: Reading) -> BadRow:
    return BadRow(
        "too large",
        f"{what}, but data.max_document_bytes is {reading.most_bytes:,}",
        "raise it or shorten the text",
    )


def text_of_value(value: object, reading: Reading) -> str:
    """The text that a row has under the key. Raises BadRow if it is no text."""
    if not isinstance(value, str):
        raise no_text(described(value), reading, "null" if value is None else "not text")
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair
        if reading.errors == "strict":
            raise BadRow(
                "not Unicode",
                f"'{reading.text_key}' is not valid Unicode at character {e.start}",
                "fix it or set data.errors=replace",
            ) from None
        return value.encode(errors="surrogatepass").decode(errors="replace")
    return value


def no_text(what: str, reading: Reading, kind: str = "not text") -> BadRow:
    return BadRow(
        kind, f"'{reading.text_key}' is {what}, not a text", "fix the row or set data.text_key"
    )


def missing(keys: Iterable[str], reading: Reading) -> BadRow:
    has = foreign.line(", ".join(keys)) or "nothing"
    return BadRow("missing", f"no '{reading.text_key}' (it has: {has})", "set data.text_key")


def described(value: object) -> str:
    """A phrase for a value in a row."""
    shown = foreign.line(reprlib.repr(value))
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    names = {
        str: "the text",
        int: "the number",
        float: "the number",
        dict: "an object",
        list: "a list",
    }
    name = next((n for kind, n in names.items() if isinstance(value, kind)), type(value).__name__)
    return f"{name} {shown}"


# --- JSON ----------------------------------------------------------------------------------------


class _Twice(dict[str, Any]):
    """An object in which a key is there more than once."""

    keys_twice: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = _Twice(found)
    twice.keys_twice = {key for key, count in Counter(k for k, _ in pairs).items() if count > 1}
    return twice


LONG_DIGITS = 4300  # of an integer: Python takes no longer ones, for the time that they need


def decoder(**options: Any) -> json.JSONDecoder:
    """A decoder that takes integers of any length, as JSON does; very long ones become inf."""
    return json.JSONDecoder(parse_int=_number, **options)


def _number(digits: str) -> float:
    return int(digits) if len(digits) <= LONG_DIGITS else float(digits)


_FAST = json.JSONDecoder(object_pairs_hook=_object)
_THOROUGH = decoder(object_pairs_hook=_object)


def _decode(data: str) -> Any:
    try:
        return _FAST.decode(data)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _THOROUGH.decode(data)


def object_of_json(data: str) -> dict[str, Any]:
    """The object in one line of JSONL. Raises BadRow if there is none."""
    value = value_of_json(data)
    if not isinstance(value, dict):
        raise BadRow(
            "not an object", f"{described(value)}, but a line of JSONL is a JSON object", "fix it"
        )
    return value


def value_of_json(data: str) -> Any:
    """The value that is JSON in a text. Raises BadRow if it is not JSON."""
    try:
        return _decode(data)
    except ValueError as e:
        raise BadRow("not JSON", f"not valid JSON ({foreign.line(str(e))})", "fix it") from None
    except RecursionError:
        raise BadRow(
            "not JSON", "lists and objects in each other, deeper than Manta reads", "fix it"
        ) from None


def text_of_json(data: str, reading: Reading) -> str:
    """The text in one line of JSONL. Raises BadRow if there is none."""
    row = object_of_json(data)
    if reading.text_key not in row:
        raise missing(row, reading)
    if isinstance(row, _Twice) and reading.text_key in row.keys_twice:
        raise BadRow("two texts", f"'{reading.text_key}' is there twice", "leave out one of them")
    return text_of_value(row[reading.text_key], reading)
