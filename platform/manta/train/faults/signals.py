"""What reaches one rank from outside and concerns all: agreed on at the end of a step."""

import enum
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from manta.errors import MantaError

SECONDS_BETWEEN = 3.0  # of asking what all ranks are asked at once


class Asked(enum.IntFlag):
    """What is asked of a run."""

    NOTHING = 0
    SAVE = 1
    """It is time for a checkpoint."""
    MOVE = 2
    """This machine or process is about to go: save, and be started again elsewhere."""
    STOP = 4
    """Save, and end."""


class Moving(MantaError):
    """A worker's machine is about to go: the run is saved, and goes on elsewhere.

    Nobody has to mend anything. It is a MantaError because those alone come out of a worker of
    Ray's as what they are (`failures.failure_of`).
    """


class Signals:
    """Asks each of `sources` at the end of a step, on each rank; made on all ranks alike.

    `shared`, if there is one, has to be asked on all ranks at once, and answers them alike. That
    goes through processes of Ray's, and is too slow for each step: it is asked now and then.
    """

    def __init__(
        self, sources: Sequence[Callable[[], Asked]], shared: Callable[[], Asked] | None = None
    ):
        self._sources, self._shared = sources, shared
        self._shared_at = time.monotonic()
        # On the CPU, whatever trains: the ranks meet here without waiting for a GPU.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def agree(self, asked: Asked = Asked.NOTHING) -> Asked:
        """What is asked of any rank (a collective call); `asked` is asked of this one in any
        case."""
        for source in self._sources:
            asked |= source()
        is_time = self._shared is not None and time.monotonic() > self._shared_at + SECONDS_BETWEEN
        flags = torch.tensor([*(bool(asked & flag) for flag in Asked), is_time], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        asked = Asked(sum(flag for flag, is_set in zip(Asked, flags, strict=False) if is_set))
        is_leaving = bool(asked & (Asked.MOVE | Asked.STOP))  # and Ray may be, too
        if flags[-1] and self._shared is not None and not is_leaving:
            asked |= self._shared()
            self._shared_at = time.monotonic()
        return asked


@contextmanager
def sigterm() -> Iterator[Callable[[], Asked]]:
    """While it lasts, SIGTERM does not end this process: it asks to MOVE.

    Python lets only the main thread handle signals, and Ray runs training in another one. The
    faulthandler module may be told in any thread to write a traceback at a signal, in C: it writes
    it into a pipe that a thread reads.
    """
    arrived = threading.Event()
    reader, writer = os.pipe()

    def wait() -> None:
        while os.read(reader, 1 << 12):
            if not closing:
                arrived.set()
        os.close(reader)

    closing: list[bool] = []
    thread = threading.Thread(target=wait, name="manta-sigterm", daemon=True)
    faulthandler.register(signal.SIGTERM, file=writer, all_threads=False, chain=False)
    thread.start()
    try:
        yield lambda: Asked.MOVE if arrived.is_set() else Asked.NOTHING
    finally:
        faulthandler.unregister(signal.SIGTERM)
        closing.append(True)
        os.close(writer)
        thread.join(timeout=5)
