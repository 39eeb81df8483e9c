"""Whether the nodes of a cluster see the same files, have the GPUs that they promise, and agree on
the time: asked before a job starts."""

import contextlib
import dataclasses
import datetime
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from manta import ownership, storage
from manta.errors import ClusterError, MantaError

# How long a node may take to answer: its first process has to start there.
ANSWER_SECONDS = 180.0
# Clocks that are further apart than this are spoken of.
CLOCK_SECONDS = 5.0
MARK = ".seen-"
DRIVER = "driver"
SEEN = b"seen"  # the content of each file in a mark
# The names of a mark and of the files in it: the driver's, a node's by its id, a rank's; also
# while they were being written.
OWN_MARK = re.compile(rf"{re.escape(MARK)}[0-9a-f]{{32}}")
OWN_FILE = re.compile(
    rf"({DRIVER}|[0-9a-f]{{56}}|rank-\d+)(\.[0-9a-f]{{8}}{re.escape(storage.UNFINISHED)})?"
)
# A mark that is older is left from a process that was killed, in seconds. It is needed for minutes.
OLD_SECONDS = 3600.0
SHARE = (
    "with several nodes, home= (or MANTA_HOME) must be a place that all of them see, such as "
    "s3://bucket/manta or a shared file system"
)
# Ray hides the GPUs from a process that has reserved none.
COUNT_GPUS = (
    "import torch; n = torch.cuda.device_count(); "
    "print(n, torch.__version__, torch.version.cuda or 'without CUDA')"
)


@dataclasses.dataclass(frozen=True)
class Look:
    """What a node is asked to look at."""

    mark: str | None
    """Folder with a file of the driver's, to which the node adds one of its own; None: the node
    does not have to write."""
    files: dict[str, int]
    """Files that the node has to see, with their sizes in bytes."""
    gpus: float = 0
    """GPUs that the node promises and the job needs."""


def require_writable(folder: str) -> None:
    """Raises ClusterError unless this process can write to a folder. Leaves nothing there."""
    with contextlib.ExitStack() as stack:
        _enter(stack, folder)


def require(
    folder: str | None,
    files: Iterable[str] = (),
    gpus: bool = False,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Checks that each node which may get work sees this process's `folder` (and can write there)
    and these files; with `gpus`, that it has the GPUs which it promises.

    Asks each other node with one small task. `folder` is None for jobs that only read. `say` gets a
    line about a clock that differs.

    Raises:
        ClusterError: a node does not; the message names it, the path and the remedy.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    known = sizes(files)
    with contextlib.ExitStack() as stack:
        mark = None if folder is None else _enter(stack, folder)
        answers = []
        for node in ray.nodes():
            has = node["Resources"]
            if not node["Alive"] or not (has.get("CPU") or has.get("GPU")):
                continue
            promised = has.get("GPU", 0.0) if gpus else 0.0
            if node["NodeID"] != here:
                answers.append((node, time.time(), _ask(node, Look(mark, known, promised))))
            elif promised:
                _refuse(node, gpu_problem(promised))
        for node, begun, answer in answers:
            clock = _answer(node, answer)
            if clock is None:
                continue  # it has left, and gets no work
            if mark is not None and unseen(mark, [node["NodeID"]]):
                _refuse(node, f"writes to {folder}, but this job does not see its files: {SHARE}")
            if apart := _apart(begun, clock, time.time()):
                say(
                    f"the clock of node {_name(node)} is {abs(apart):.0f} s "
                    f"{'ahead' if apart > 0 else 'behind'}: set it (NTP), as the times in logs "
                    "depend on it"
                )


@contextlib.contextmanager
def marked(folder: str) -> Iterator[str]:
    """A new folder in `folder` with a file of this process's; the end of the block removes it. So
    does the next one in this folder, an hour later, if the process was killed."""
    new = _missing(folder)
    mark = storage.join(folder, f"{MARK}{uuid.uuid4().hex}")
    try:
        try:
            storage.write_bytes(storage.join(mark, DRIVER), SEEN)
        except FileNotFoundError:  # another job has just removed a folder that it had made
            storage.write_bytes(storage.join(mark, DRIVER), SEEN)
        with contextlib.suppress(Exception):  # another job may be doing it, too
            _remove_old(folder, storage.info(storage.join(mark, DRIVER)).mtime)
        yield mark
    finally:
        with contextlib.suppress(Exception):
            storage.delete_folder(mark)
        with contextlib.suppress(OSError):  # the job has written something else there
            for path in new:
                path.rmdir()


def _remove_old(folder: str, now: datetime.datetime) -> None:
    """Deletes the marks in a folder that killed processes left there: those that have nothing but
    files of a mark, all of them old. `now` is the storage's time, as clocks differ."""
    before = now - datetime.timedelta(seconds=OLD_SECONDS)
    for item in storage.list_files(folder, recursive=False):
        path = storage.join(folder, item.base_name)
        if item.is_file or not OWN_MARK.fullmatch(item.base_name) or ownership.is_link(path):
            continue
        found = storage.list_files(path)
        # (an object store knows no time of a folder, and has no folder without a file)
        times = [it.mtime for it in (item, *found) if it.is_file or storage.is_local(path)]
        if all(_is_own(path, it) for it in found) and all(time < before for time in times):
            ownership.clear(path, OWN_FILE)


def _is_own(mark: str, item: Any) -> bool:
    """Whether what is in a mark is a file that a job writes there, perhaps not to its end."""
    is_file = item.is_file and not ownership.is_link(storage.join(mark, item.base_name))
    return bool(is_file and item.size <= len(SEEN) and OWN_FILE.fullmatch(item.base_name))


def _missing(folder: str) -> list[Path]:
    """The local folders that have to be made for this one, itself first."""
    if not storage.is_local(folder):
        return []
    path = Path(storage.filesystem(folder)[1])
    return [it for it in (path, *path.parents) if not it.exists()]


def sizes(files: Iterable[str]) -> dict[str, int]:
    """These files with their sizes in bytes, as a node has to see them."""
    return {path: storage.info(path).size for path in files}


def look(asked: Look, name: str) -> str | None:
    """What is wrong on this node, as the end of a sentence about it; None if nothing is. Runs on
    the node, whose own file in the mark gets this name. What the storage raises is passed on."""
    if asked.mark is not None:
        folder = asked.mark.rpartition("/")[0]
        if not storage.exists(storage.join(asked.mark, DRIVER)):
            return f"does not see what this job has just written to {folder}: {SHARE}"
        storage.write_bytes(storage.join(asked.mark, name), SEEN)
    for path, size in asked.files.items():
        found = storage.info(path).size if storage.exists(path) else None
        if found is None:
            return f"does not see {path}: {SHARE}, and so must the data"
        if found != size:
            return f"sees another file at {path} ({found} bytes, not {size}): {SHARE}"
    return gpu_problem(asked.gpus) if asked.gpus else None


def unseen(mark: str, names: Iterable[str]) -> list[str]:
    """The files of the mark, of these, that are not to be seen here."""
    return [name for name in names if not storage.exists(storage.join(mark, name))]


def look_and_tell(asked: Look, name: str) -> tuple[str | None, float]:
    """What is wrong on this node, whatever it is, and the node's time."""
    try:
        problem = look(asked, name)
    except Exception as e:  # each object store has errors of its own
        where = asked.mark.rpartition("/")[0] if asked.mark else ", ".join(asked.files)
        problem = f"cannot use {where} ({_line(e)}): give it access there, or another home="
    return problem, time.time()


def gpu_problem(promised: float) -> str | None:
    """What is wrong if PyTorch does not find the GPUs here that this node promises to Ray."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.device_count() >= promised:
        return None
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", COUNT_GPUS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    count, _, version = done.stdout.strip().partition(" ")
    if done.returncode:
        return f"promises {promised:g} GPUs, but PyTorch fails there: {done.stderr.strip()[-200:]}"
    if int(count) >= promised:
        return None
    return (
        f"promises {promised:g} GPUs, but PyTorch ({version}) finds {count}: install a driver and "
        "a PyTorch with CUDA there, or start its Ray with the number of GPUs that it has"
    )


def refuse(problem: str | None) -> None:
    """Raises ClusterError about this node if there is a problem."""
    if problem is not None:
        raise ClusterError(f"{_here()} {problem}")


def _ask(node: dict[str, Any], asked: Look) -> Any:
    """Starts a task that looks, on a node. Returns its answer to come."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task: Any = ray.remote(look_and_tell).options(
        num_cpus=0, max_retries=0, scheduling_strategy=there
    )
    return task.remote(asked, node["NodeID"])


def _answer(node: dict[str, Any], answer: Any) -> float | None:
    """The time that a node tells; None if it has left the cluster.

    Raises:
        ClusterError: something is wrong there.
    """
    import ray

    try:
        problem, clock = ray.get(answer, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        problem = f"has not answered within {ANSWER_SECONDS:g} s: see its logs, or remove it"
    except ray.exceptions.RayError as e:
        if not any(n["Alive"] for n in ray.nodes() if n["NodeID"] == node["NodeID"]):
            return None
        problem = (
            f"cannot run this job's code ({_line(getattr(e, 'cause', None) or e)}): it needs the "
            "packages that this job has, in the same versions"
        )
    _refuse(node, problem)
    told: float = clock
    return told


def _enter(stack: contextlib.ExitStack, folder: str) -> str:
    """Makes a mark that lasts as long as the stack. Raises ClusterError if that cannot be."""
    try:
        return stack.enter_context(marked(folder))
    except MantaError:
        raise
    except Exception as e:  # each object store has errors of its own
        raise ClusterError(
            f"{folder}: {_here()} cannot write there ({_line(e)}); set home= (or MANTA_HOME) to a "
            "folder or bucket that exists and that this job may write to"
        ) from None


def _refuse(node: dict[str, Any], problem: str | None) -> None:
    if problem is not None:
        raise ClusterError(f"node {_name(node)} {problem}")


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _here() -> str:
    return f"node {socket.gethostname()}"


def _apart(begun: float, clock: float, ended: float) -> float:
    """How far a clock that was read between two moments is from them, in seconds, if that is far;
    else 0."""
    if begun - CLOCK_SECONDS <= clock <= ended + CLOCK_SECONDS:
        return 0.0
    return clock - (begun if clock < begun else ended)


def _line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
