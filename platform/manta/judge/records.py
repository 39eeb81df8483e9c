"""Lines of JSON that are kept as they come, so that a job that is killed goes on from there.

Each row has a `key`, a digest of all that decides it. So whatever has changed (a question, a model,
the judge) has another key, and what is there already is not made again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from manta import foreign, storage
from manta.errors import ConfigError, DataError
from manta.job import hint


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a file."""

    key: str


R = TypeVar("R", bound=Row)


def key_of(*parts: Any) -> str:
    """A key that differs for other parts, which are plain values."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def local_folder(path: str) -> str:
    """Returns a folder's path. Raises ConfigError if files in it cannot grow."""
    if not storage.is_local(path):
        raise ConfigError(
            f"{path}: answers and judgements are added to files, which an object store cannot do; "
            "give a local home=, and the checkpoints by their whole paths"
        )
    return path


class Records(Generic[R]):
    """The rows of a file, by key; of rows with the same key, the last one counts.

    A line that is no such row is passed over, and counted in a hint: the end of a file may have
    half a line, of a process that was killed.
    """

    def __init__(self, path: str, kind: type[R]):
        self.path = path
        self._file = Path(storage.filesystem(path)[1])
        self.rows: dict[str, R] = {}
        bad = 0
        data = self._file.read_bytes() if self._file.exists() else b""
        self._is_whole = not data or data.endswith(b"\n")
        for line in data.splitlines():
            try:
                row = foreign.parse(line, kind)
            except ValueError:
                bad += 1
                continue
            self.rows[row.key] = row
        if bad:
            hint(f"{path}: {bad:,} lines are not whole, and are passed over")

    def add(self, rows: Iterable[R]) -> None:
        """Adds rows, and waits until they are on the disk. Raises DataError if that fails."""
        new = list(rows)
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=True) for row in new]
        with storage.writing(self.path, "free some space there, then run the same command again"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self._file, flags, 0o600), "ab") as f:
                before = b"" if self._is_whole else b"\n"
                f.write(before + "".join(f"{line}\n" for line in lines).encode())
                f.flush()
                os.fsync(f.fileno())
        self._is_whole = True
        self.rows |= {row.key: row for row in new}


def json_file(path: str, what: str) -> str:
    """The place for figures as JSON. Raises DataError if something else is there than figures that
    have `what`."""
    place = storage.absolute(path)
    if storage.exists(place):
        try:
            found = storage.read_json(place)
        except DataError:
            found = None
        if not isinstance(found, dict) or what not in found:
            raise DataError(
                f"json={path}: something else than earlier figures is there, and stays; give "
                "another json="
            )
    return place
