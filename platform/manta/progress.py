"""Progress of long work: a bar in a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from manta.terminal import visible

LINE_SECONDS = 5.0


class Progress:
    """Counts `total` units of work; use it as a context manager. The bar is written to `terminal`
    (None: stderr) if that is a terminal."""

    def __init__(self, title: str, total: int, unit: str, terminal: TextIO | None = None):
        self._title, self._total, self._unit = visible(title), total, unit
        self._done = 0
        self._started = self._printed = time.monotonic()
        terminal = terminal or sys.stderr
        self._bar = (
            tqdm(total=total, desc=self._title, unit=f" {unit}", ncols=88, file=terminal)
            if terminal.isatty()
            else None
        )

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        note = visible(note)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS or self._done >= self._total:
            self._printed = now
            elapsed = now - self._started
            text = f"{self._title}: {self._done}/{self._total} {self._unit}, {elapsed:.0f} s"
            print(text + (f", {note}" if note else ""), flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        stack: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
