"""Ends a job whose own Ray has died, with a line that says so.

Ray itself takes 15 to 60 s to notice. Then it ends the process from C++, with pages of its own
logs, and no code of Manta runs any more.
"""

import os
import sys
import threading
import time
from typing import Any

from manta.terminal import visible

SECONDS = 0.25  # between two looks
VITAL = ("raylet", "gcs_server")  # what Ray cannot do without, by its names for them


def watch() -> None:
    """Watches the Ray that this process has started, in a thread, until it is shut down. If one of
    its vital processes dies before, this process ends with exit code 1."""
    from ray._private.worker import _global_node

    threading.Thread(
        target=_watch, args=(_global_node,), name="manta-lifeline", daemon=True
    ).start()


def _watch(node: Any) -> None:
    def died() -> dict[str, int]:
        """The vital processes that ended, with their exit codes; a shutdown ends none of them
        before it disconnects."""
        gone = {kind: process.poll() for kind, process in list(node.dead_processes())}
        return {kind: gone[kind] for kind in VITAL if kind in gone} if _is_connected(node) else {}

    while _is_connected(node):
        time.sleep(SECONDS)
        if died():
            time.sleep(SECONDS)  # in case that a shutdown has begun
        if gone := died():
            print(f"error: {_said(gone)}", file=sys.stderr, flush=True)
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            os._exit(1)  # not by `sys.exit`: the main thread may wait for Ray


def _is_connected(node: Any) -> bool:
    import ray

    return ray.is_initialized() and ray._private.worker._global_node is node


def _said(gone: dict[str, int]) -> str:
    kind, code = next(iter(gone.items()))
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    memory = ", which the kernel sends if memory runs out" if code == -9 else ""
    return visible(
        f"the Ray that this job had started is gone: its {kind} {how}{memory}; run the same "
        "command to continue"
    )
