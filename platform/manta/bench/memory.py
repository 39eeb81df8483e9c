"""How much memory Manta holds, all its processes together."""

import resource
import sys
import threading

import psutil

# Ray Data's own two, one each for a whole cluster, whatever the number of streams.
SHARED_ACTORS = ("ray::_StatsActor", "ray::_AutoscalingCoordinatorActor")
RAY_PROCESSES = ("ray::", "raylet", "gcs_server", "/ray/", "ray.util", "ray-dashboard")
# How pages that several processes share (the object store's) are counted: what each has of them
# (PSS), Linux alone tells.
COUNTED_ONCE = sys.platform == "linux"
COUNTED = "shared pages once" if COUNTED_ONCE else "shared pages in each process that has them"


def peak_resident() -> int:
    """The most bytes that this process has held, with all its libraries."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB everywhere but on a Mac


def total_memory(without: tuple[str, ...] = ()) -> int:
    """Bytes that this process and all of Ray's on this machine hold, but for those whose command
    has one of these names in it; shared pages as COUNTED says."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if any(name in command for name in without):
            continue
        if process.pid == psutil.Process().pid or any(n in command for n in RAY_PROCESSES):
            try:
                if COUNTED_ONCE:
                    total += process.memory_full_info().pss
                else:  # (of other processes, a Mac tells even their own pages to root alone)
                    total += process.memory_info().rss
            except psutil.Error:
                continue  # it ended, or is another user's
    return total


class MemoryWatch:
    """The most of `total_memory`, looked at once a second and at the end."""

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
        """The peak of the first and of the second half of the time."""
        middle = len(self._found) // 2
        return max(self._found[:middle], default=0), max(self._found[middle:], default=0)
