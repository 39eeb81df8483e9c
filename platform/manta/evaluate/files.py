"""Texts and rows that evaluations read from a person's files."""

import json
from collections.abc import Callable
from typing import Any

from manta import storage
from manta.errors import DataError


def read_text(path: str, key: str) -> str:
    """Raises DataError, naming `key`, when the file is missing, empty or not UTF-8."""
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
    """What `read` makes of each line of a JSONL file; it raises ValueError, KeyError or TypeError
    where a row is not as it should be.

    Args:
        shown: the path as a person gave it, with its key.
        of: whose rows these are.
        has: what each of them has.

    Raises:
        DataError: a line is no such row, named; or there is none.
    """
    rows = []
    for number, line in enumerate(storage.read_bytes(path).splitlines(), 1):
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{shown}, line {number}: not a row of {of}'s ({e!r}); each has {has}"
            ) from None
    if not rows:
        raise DataError(f"{shown}: the file is empty")
    return rows
