"""Reads texts and rows of evaluations from a person's files."""

from collections.abc import Callable
from typing import Any

from manta import foreign, storage
from manta.errors import DataError
from manta.terminal import line

MOST_BYTES = 256 << 20  # of a file, which is read whole; the published ones have up to 50 MB


def read_text(path: str, key: str) -> str:
    """Reads a text. Raises DataError, naming `key`, if the file is missing, empty, too large or not
    UTF-8."""
    data = foreign.read_bytes(storage.absolute(path), DataError, MOST_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{key}={path}: not UTF-8 at byte {e.start}; convert the file") from None
    if not text.strip():
        raise DataError(f"{key}={path}: the file is empty")
    return text


def read_rows(
    path: str, shown: str, of: str, has: str, read: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `read` returns for each line of a JSONL file. `read` raises ValueError or KeyError if a
    row is not valid.

    Args:
        shown: the path as a person gave it, with its key.
        of: the name of the data set.
        has: the fields of a row, for the message.

    Raises:
        DataError: a line is not valid (the message has its number), or the file has no lines.
    """
    rows = []
    lines = foreign.read_bytes(path, DataError, MOST_BYTES).splitlines()
    for number, content in enumerate(lines, 1):
        try:
            rows.append(read(foreign.parse(content, dict)))
        except (ValueError, KeyError) as e:
            why = f"{line(str(e))} is missing" if isinstance(e, KeyError) else e
            raise DataError(
                f"{shown}, line {number}: not a row of {of} ({why}); each has {has}"
            ) from None
    if not rows:
        raise DataError(f"{shown}: the file is empty")
    return rows
