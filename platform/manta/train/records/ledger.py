"""How a run's time was spent, since its first start and across restarts: its goodput.

Goodput is the time of the steps that the run kept, without their wait for data, divided by all
time. Wall clocks serve only to tell how long nothing ran. Within a process time is monotonic, so a
clock that jumps does no harm.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

from manta import foreign, layout, storage
from manta.config import NonNegativeFloat
from manta.errors import DataError
from manta.foreign import Whole
from manta.job import hint_once

Cause = Literal[
    "productive",  # steps
    "data wait",  # waiting for data within steps
    "start",  # until the first step: Ray, the model, the checkpoint
    "replay",  # steps that were lost and trained again
    "checkpoint",  # training paused for the copy that is saved
    "evaluation",  # val loss and samples
    "down",  # nothing ran: from a death to the next start
    "other",  # logging and the rest
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
SECONDS_BETWEEN_WRITES = 1.0
LATEST = 1e11  # a time that no clock has: the year 5138


class Ledger:
    """Counts a run's time by cause, on rank 0. The ledgers of other ranks have `run=None`, and are
    never written."""

    def __init__(self, run: str | None, lost_seconds: float):
        """Continues from what `begin` counted; the time since then counts as "start".

        Args:
            lost_seconds: time of the steps after the checkpoint that this run resumes from.
        """
        self._path = None if run is None else storage.join(run, layout.GOODPUT)
        self._seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._written = 0.0
        self.starts = 1
        before = _read(self._path) if self._path else None
        now, self._begun = time.time(), time.monotonic()
        if before is not None:
            self._seconds |= before["seconds"]
            self.starts = before["starts"] + 1
            lost = min(lost_seconds, self._seconds["productive"])
            self._seconds["productive"] -= lost
            self._seconds["replay"] += lost
            self._seconds["start"] += max(0.0, now - before["updated"])
        self._base = sum(self._seconds.values())

    def add(self, cause: Cause, seconds: float) -> None:
        self._seconds[cause] += seconds

    @contextmanager
    def timing(self, cause: Cause) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(cause, time.monotonic() - started)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by cause, which add up to the time since the run's first start."""
        total = self._base + time.monotonic() - self._begun
        known = sum(s for cause, s in self._seconds.items() if cause != "other")
        return {**self._seconds, "other": max(0.0, total - known)}

    @property
    def goodput(self) -> float:
        seconds = self.seconds
        return seconds["productive"] / max(sum(seconds.values()), 1e-9)

    def write(self, *, last: bool = False) -> None:
        """Writes the counts to disk; at most once per SECONDS_BETWEEN_WRITES, unless `last`."""
        now = time.monotonic()
        if self._path is None or (now - self._written < SECONDS_BETWEEN_WRITES and not last):
            return
        self._written = now
        entry = {"seconds": self.seconds, "updated": time.time(), "starts": self.starts}
        with suppress(OSError):  # a full disk must not stop the run
            storage.write_json(self._path, entry)


def begin(run: str, started: float) -> None:
    """Starts a run's ledger, or adds the time since its last entry as "down".

    Args:
        started: the moment (time.time()) when the process that a person started began, or when it
            found its workers dead.
    """
    path = storage.join(run, layout.GOODPUT)
    with suppress(OSError):  # a full disk must not stop the run
        before = _read(path)
        if before is None and storage.exists(path):
            storage.set_aside(path, layout.DAMAGED)
        entry = before or {"seconds": {"down": 0.0}, "updated": started, "starts": 0}
        entry["seconds"]["down"] += max(0.0, started - entry["updated"])
        storage.write_json(path, {**entry, "updated": max(started, entry["updated"])})


@dataclasses.dataclass
class _File:
    seconds: dict[str, NonNegativeFloat]
    updated: NonNegativeFloat
    starts: Whole

    def __post_init__(self) -> None:
        if self.updated > LATEST:
            raise ValueError(f"updated={self.updated:g}: no clock has this time")


def _read(path: str) -> dict[str, Any] | None:
    """What is in a ledger; None if there is none, or (which it says once) a damaged one."""
    if not storage.exists(path):
        return None
    try:
        found = foreign.read_json(path, _File, DataError, "the time until now is not known")
    except DataError as e:
        hint_once(str(e))
        return None
    seconds = {cause: found.seconds.get(cause, 0.0) for cause in CAUSES}
    return {"seconds": seconds, "updated": found.updated, "starts": found.starts}


def seconds_of(run: str) -> float:
    """All seconds since the run's first start; 0 if not known."""
    found = _read(storage.join(run, layout.GOODPUT))
    return sum(found["seconds"].values()) if found else 0.0


def causes_of(run: str) -> dict[str, float]:
    """A run's seconds by cause; all 0 if not known."""
    found = _read(storage.join(run, layout.GOODPUT))
    return found["seconds"] if found else dict.fromkeys(CAUSES, 0.0)


def starts_of(run: str) -> int:
    """How often a run's workers have started; 0 if not known."""
    found = _read(storage.join(run, layout.GOODPUT))
    return found["starts"] if found else 0


def updated(run: str) -> float:
    """The time (time.time()) of the run's last entry; 0 if not known."""
    found = _read(storage.join(run, layout.GOODPUT))
    return found["updated"] if found else 0.0


def table(run: str) -> list[str]:
    """Lines for the summary: goodput, and the share of time lost to each cause."""
    found = _read(storage.join(run, layout.GOODPUT))
    if found is None:
        return []
    seconds, total = found["seconds"], max(sum(found["seconds"].values()), 1e-9)
    lost = sorted(((s, c) for c, s in seconds.items() if c != "productive"), reverse=True)
    parts = ", ".join(f"{cause} {s / total:.1%}" for s, cause in lost if s / total >= 0.0005)
    return [f"goodput      {seconds['productive'] / total:.1%} of {total:,.0f} s ({parts})"]
