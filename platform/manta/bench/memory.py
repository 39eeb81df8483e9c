"""Measures how much memory all of Manta's processes use together."""

import resource
import sys
import threading

import psutil

# Ray Data's own two actors: a cluster has one of each, whatever the number of streams.
SHARED_ACTORS = ("ray::_StatsActor", "ray::_AutoscalingCoordinatorActor")
RAY_PROCESSES = ("ray::", "raylet", "gcs_server", "/ray/", "ray.util", "ray-dashboard")
# Several processes share pages, such as the object store's. Only Linux tells each process's part of
# them (PSS), so only there can each shared page be counted once.
COUNTED_ONCE = sys.platform == "linux"
COUNTED = "shared pages once" if COUNTED_ONCE else "shared pages in each process that has them"


def peak_resident() -> int:
    """The peak memory of this process in bytes, with all its libraries."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB everywhere but on a Mac


def total_memory(without: tuple[str, ...] = ()) -> int:
    """Bytes that this process and all of Ray's processes on this machine use, except those whose
    command has one of the names in `without`. Shared pages count as COUNTED says."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if any(name in command for name in without):
            continue
        if process.pid == psutil.Process().pid or any(n in command for n in RAY_PROCESSES):
            try:
                if COUNTED_ONCE:
                    total += process.memory_full_info().pss
                else:  # (a Mac tells other processes' own pages to root only)
                    total += process.memory_info().rss
            except psutil.Error:
                continue  # the process ended, or another user owns it
    return total


class MemoryWatch:
    """Watches `total_memory`: measures it once a second and at the end, and keeps the values."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        self._without = without
        self._found: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._found.append(total_memory(self._without))

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._found.append(total_memory(self._without))

    @property
    def peak(self) -> int:
        return max(self._found, default=0)

    def halves(self) -> tuple[int, int]:
        """The peaks of the first and of the second half of the time."""
        middle = len(self._found) // 2
        return max(self._found[:middle], default=0), max(self._found[middle:], default=0)
