"""Signals that reach one rank from outside and concern all; the ranks agree after each step."""

import contextlib
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

SECONDS_BETWEEN = 3.0  # two calls of `shared`, which all ranks make at once
SECONDS_BETWEEN_LOOKS = 5.0  # at warnings


class Asked(enum.IntFlag):
    """What a run is asked to do."""

    NOTHING = 0
    SAVE = 1
    """It is time for a checkpoint."""
    MOVE = 2
    """This machine or process is about to go away: save, then start again elsewhere."""
    STOP = 4
    """Save, then end."""


class Moving(MantaError):
    """A worker's machine is about to go away: the run is saved, and resumes elsewhere.

    Nobody has to fix anything. This is a MantaError because only MantaErrors keep their type when
    they leave a Ray worker (`failures.failure_of`).
    """


class Signals:
    """Asks each of `sources` at the end of a step, on each rank. All ranks must make it alike.

    `shared`, if given, has to be called on all ranks at once, and gives all of them the same
    answer. The call goes through Ray's processes, which is too slow for each step: it is made every
    few seconds.
    """

    def __init__(
        self, sources: Sequence[Callable[[], Asked]], shared: Callable[[], Asked] | None = None
    ):
        self._sources, self._shared = sources, shared
        self._shared_at = time.monotonic()
        # The group is on the CPU even if GPUs train: the ranks need not wait for a GPU here.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def close(self) -> None:
        """Gives back the ranks' group. All ranks must do so alike."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def agree(self, asked: Asked = Asked.NOTHING) -> Asked:
        """Everything that any rank is asked to do, including `asked` on this one. (A collective
        call.)"""
        for source in self._sources:
            asked |= source()
        is_time = self._shared is not None and time.monotonic() > self._shared_at + SECONDS_BETWEEN
        flags = torch.tensor([*(bool(asked & flag) for flag in Asked), is_time], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        asked = Asked(sum(flag for flag, is_set in zip(Asked, flags, strict=False) if is_set))
        is_leaving = bool(asked & (Asked.MOVE | Asked.STOP))  # and Ray may be leaving, too
        if flags[-1] and self._shared is not None and not is_leaving:
            asked |= self._shared()
            self._shared_at = time.monotonic()
        return asked


@contextmanager
def sigterm() -> Iterator[Callable[[], Asked]]:
    """Makes SIGTERM ask to MOVE, instead of ending this process, as long as the context lasts.

    Python handles signals only in the main thread, and Ray runs training in another one. But any
    thread can tell the faulthandler module to write a traceback at a signal (in C): here it writes
    to a pipe, and a thread reads that pipe.
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


@contextmanager
def warned(
    look: Callable[[], str | None],
    say: Callable[[str], None],
    pause: float = SECONDS_BETWEEN_LOOKS,
) -> Iterator[Callable[[], Asked]]:
    """Makes each warning that this machine may be taken back ask to SAVE, once, as long as the
    context lasts.

    Args:
        look: returns the last warning, or None. A thread calls it, as the answer comes from another
            machine. A warning that is there at the start asks for nothing: nothing is lost yet.
        say: gets a line about each warning.
        pause: seconds between two looks.
    """
    arrived, over = threading.Event(), threading.Event()

    def watch() -> None:
        known, is_first = None, True
        while not over.is_set():
            with contextlib.suppress(Exception):  # Ray's head may be away
                found = look()
                if found not in (None, known) and not is_first:
                    arrived.set()
                    say(f"{found}: saving a checkpoint, as this machine may go")
                known, is_first = found, False
            over.wait(pause)

    def asked() -> Asked:
        if not arrived.is_set():
            return Asked.NOTHING
        arrived.clear()
        return Asked.SAVE

    thread = threading.Thread(target=watch, name="manta-warned", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join(timeout=5)
