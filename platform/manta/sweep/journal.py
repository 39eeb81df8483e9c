"""The journal of a sweep: a line of JSON for each decision and each result, in the sweep's folder.

Lines have no times and no machine in them: two sweeps that decided the same have equal journals. A
line that a kill cut short is dropped: what it said is decided again, the same.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from manta import foreign, storage
from manta.errors import SweepError
from manta.foreign import Finite, Whole

What = Literal["sweep", "extend", "start", "continue", "copy", "result", "retry", "end"]
REMEDY = "restore the file, or give the sweep another name="


@foreign.exact
@dataclasses.dataclass(frozen=True)
class Identity:
    """What decides the trials of a sweep."""

    sweep: dict[str, Any]
    """The keys of `sweep`; its space has the short forms in it."""
    shared: dict[str, Any]
    """What all trials share: dotted keys with values that are not the defaults."""


@foreign.exact
@dataclasses.dataclass(frozen=True)
class Record:
    """A line of a journal. Which fields it has depends on `what`; those that are None are left
    out."""

    what: What
    """sweep: the sweep begins; extend: its space has more values; start, continue, copy: a segment
    of a trial is given to a lane (copy: from another trial's checkpoint); result: what came of one;
    retry: a trial that failed is tried again; end: nothing is left to do."""
    trial: str | None = None
    settings: dict[str, Any] | None = None
    seed: Whole | None = None
    start: Whole | None = None
    until: Whole | None = None
    source: str | None = None
    tokens: Whole | None = None
    loss: Finite | None = None
    why: str | None = None
    diverged: bool | None = None
    plan: Identity | None = None
    lanes: Whole | None = None

    def line(self) -> bytes:
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Notes:
    """A journal in memory, for plans that nothing follows from."""

    path = "the plan"

    def __init__(self, records: Sequence[Record] = ()):
        self.records = list(records)

    def append(self, record: Record) -> None:
        self.records.append(record)


class Journal(Notes):
    """A journal at a path. Only one process at a time may write to it: lock the sweep.

    Raises:
        SweepError: the file has a line that no sweep wrote.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self._data = foreign.read_bytes(path, SweepError) if storage.exists(path) else b""
        whole, newline, torn = self._data.rpartition(b"\n")
        self._data, self._is_torn = whole + newline, bool(torn)
        for number, line in enumerate(self._data.splitlines(), 1):
            try:
                self.records.append(foreign.parse(line, Record))
            except ValueError as e:
                raise SweepError(f"{path}, line {number}: {e}; {REMEDY}") from None

    def append(self, record: Record) -> None:
        """Adds a line, which is on the disk when this returns."""
        line = record.line()
        self._data += line
        self.records.append(record)
        if self._is_torn or not storage.is_local(self.path):
            storage.write_bytes(self.path, self._data)
            self._is_torn = False
            return
        file = Path(storage.filesystem(self.path)[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
