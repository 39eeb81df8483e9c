"""Reads texts and rows of evaluations from a person's files."""

import json
from collections.abc import Callable
from typing import Any

from manta import storage
from manta.errors import DataError


def read_text(path: str, key: str) -> str:
    """Reads a text. Raises DataError, naming `key`, if the file is missing, empty or not UTF-8."""
    try:
        text = storage.read_bytes(storage.absolute(path)).decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{key}={path}: not UTF-8 at byte {e.start}; convert the file") from None
    if not text.strip():
        raise DataError(f"{key}={path}: the file is empty")
    return text


def read_rows(
    path: str, shown: str, of: str, has: str, read: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `read` returns for each line of a JSONL file. `read` raises ValueError, KeyError or
    TypeError if a row is not valid.

    Args:
        shown: the path as a person gave it, with its key.
        of: the name of the data set.
        has: the fields of a row, for the message.

    Raises:
        DataError: a line is not valid (the message has its number), or the file has no lines.
    """
    rows = []
    for number, line in enumerate(storage.read_bytes(path).splitlines(), 1):
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{shown}, line {number}: not a row of {of} ({e!r}); each has {has}"
            ) from None
    if not rows:
        raise DataError(f"{shown}: the file is empty")
    return rows
