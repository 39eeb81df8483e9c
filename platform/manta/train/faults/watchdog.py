"""Detects a rank that makes no progress, keeps its stacks and ends its process, so that all ranks
start again from the last checkpoint."""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

EXIT_CODE = 70
# When one rank hangs, all the others wait for it: this gives each one time to write its stacks.
GRACE_SECONDS = 5.0


class Watchdog:
    """Ends this process when `beat` has not been called for `limit` seconds (None: never)."""

    def __init__(self, limit: float | None, dump: Callable[[str], None]):
        """Starts watching. At the end, `dump(stacks)` is called with the stacks of all threads."""
        self._limit, self._dump = limit, dump
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="manta-watchdog", daemon=True)
        if limit is not None:
            self._thread.start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._stop.wait(min(1.0, self._limit / 4)):
            seen = self._last
            if time.monotonic() - seen < self._limit:
                continue
            try:
                self._dump(stacks())
            finally:
                ended = self._stop.wait(GRACE_SECONDS)
                if not ended and self._last == seen:
                    os._exit(EXIT_CODE)


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
