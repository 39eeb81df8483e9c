"""Starts Ray's processes on this machine; tries again where they do not come up in time."""

import atexit
import compileall
import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manta import storage
from manta.errors import ClusterError

# How long each try waits for Ray's control server, in seconds. (Ray waits for its raylet for 30 s,
# whatever one asks; by the next try the machine has Ray's files in its memory.)
TRIES = (30, 60, 120)
WAIT = "RAY_gcs_server_port_wait_time_s"
# A variable in the environment of all processes that one try starts, to find and end them by.
MARK = "MANTA_RAY_START"
IN_TIME = re.compile(r"tim(ed|e) ?-?out|overloaded|did not start in time", re.IGNORECASE)


def start(begin: Callable[[], None]) -> None:
    """Calls `begin`, which starts Ray's processes; again if they were not up in time. The processes
    of a try that failed are ended.

    Raises:
        ClusterError: Ray did not start; the message says why, and where Ray's logs are.
    """
    before = os.environ.get(WAIT)
    failed: list[str] = []
    try:
        for seconds in TRIES:
            os.environ[WAIT] = str(max(seconds, int(before or 0)))
            os.environ[MARK] = uuid.uuid4().hex
            try:
                begin()
                return
            except ClusterError:
                raise
            except Exception as e:
                _end(os.environ[MARK])
                failed.append(" ".join(str(e).split())[:700] or type(e).__name__)
                if not IN_TIME.search(failed[-1]):
                    break
    finally:
        del os.environ[MARK]
        os.environ.pop(WAIT)
        if before is not None:
            os.environ[WAIT] = before
    tries = f" in {len(failed)} tries" if len(failed) > 1 else ""
    remedy = "see Ray's logs in {}"
    if IN_TIME.search(failed[-1]):
        remedy = "this machine is too busy or short of memory: try again when less runs (logs: {})"
    raise ClusterError(
        f"Ray did not start on this machine{tries} ({failed[-1]}); {remedy.format(logs())}"
    )


@contextlib.contextmanager
def without_spare_processes(keep_logs: bool) -> Iterator[None]:
    """Keeps Ray from starting, in this block, what a Ray for one job on one machine has no use for:
    the autoscaler, the server of a dashboard that is not shown, and, unless `keep_logs`, what
    passes the workers' output on. Each is a process that imports Ray."""
    from ray._private.node import Node

    def nothing(_node: Any, **_arguments: Any) -> None:
        pass

    spare = ["start_monitor", "start_api_server", *([] if keep_logs else ["start_log_monitor"])]
    before = {name: getattr(Node, name) for name in spare}
    for name in spare:
        setattr(Node, name, nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def importing(package: Path) -> Iterator[None]:
    """Has the processes that Ray starts in this block import a copy of this package, which stays as
    it is if somebody edits the code while a job runs. The copy is deleted when this process ends.

    Ray's own way, `py_modules`, is for clusters: with it each worker is started twice, and imports
    Ray the first time only to find out what the second one needs.
    """
    with storage.writing(tempfile.gettempdir(), "free disk space, or set TMPDIR to another folder"):
        copy = tempfile.mkdtemp(prefix="manta-code-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        shutil.copytree(package, Path(copy) / package.name)
        compileall.compile_dir(copy, quiet=2)  # once, where it is not compiled, for all workers
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([copy, *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def logs() -> Path:
    """The folder where Ray writes the logs of what was started last on this machine."""
    from ray._common.utils import get_default_ray_temp_dir

    return Path(get_default_ray_temp_dir()) / "session_latest" / "logs"


def _end(mark: str) -> None:
    """Ends the processes that were started with this mark, and waits until they are gone."""
    import psutil  # here, as only a start that failed needs it

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=10)
