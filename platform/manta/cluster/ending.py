"""Signals that end a process which has joined a Ray.

Ray makes SIGTERM raise SystemExit: its exit code is 15, or 1 where the signal comes during a call
of Ray's, which also swallows any other exception. SIGUSR1, Slurm's notice, would end the process on
the spot. Here both raise SystemExit, so that what is open is closed and what was asked for is taken
back, and the signal is kept for the exit code.
"""

import signal
import threading
from typing import Any, NoReturn

ENDING = (signal.SIGTERM, signal.SIGUSR1)
_came: list[signal.Signals] = []


def obey() -> None:
    """Makes the signals in ENDING end this process by an exception, if this is its main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, _hear)


def _hear(number: int, _frame: Any) -> None:
    end(signal.Signals(number))


def end(by: signal.Signals) -> NoReturn:
    """Raises SystemExit with the code of a process that a signal ended, and keeps the signal."""
    _came.append(by)
    raise SystemExit(128 + by)


def settle() -> signal.Signals | None:
    """Returns the signal that ended this process, and None if none did. Once one did, more of them
    change nothing."""
    if not _came:
        return None
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    return _came.pop()
