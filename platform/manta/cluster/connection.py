"""The connection to Ray: starts or joins a cluster, and sends it this code."""

import contextlib
import functools
import ipaddress
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manta
from manta.cluster import dashboard, ending, lifeline, starting
from manta.cluster.authentication import AUTH_HINT, is_refusal, protect_token
from manta.errors import ClusterError

PACKAGE = Path(manta.__file__).parent
LOCAL_OBJECT_STORE_BYTES = 512 << 20
# Without it, the API of Ray's dashboard has nothing about runs (/api/train/v2/runs/v1). It takes
# a process, of which a Ray that is started for one job has no use, as it has no dashboard.
TRAIN_RECORDS = ("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
# Ray Train watches, in a process of its own, for nodes that are about to leave. It is off for Ray
# with any value but "1" and "true". Children inherit the variable, and so do the nodes that they
# start, so each connection sets it, unless a person has chosen another value.
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
WATCHES, NOBODY_LEAVES = "1", "off: the only node is this machine"
# Ray's own words for it: the cluster's versions, then this process's.
OTHER_VERSIONS = re.compile(
    r"Version mismatch.*Ray: (\S+)\s+Python: (\S+)\s.*Ray: (\S+)\s+Python: (\S+)", re.DOTALL
)


def connect(own: bool = False, name: str | None = None, **local: Any) -> None:
    """Joins the cluster that RAY_ADDRESS names, or this user's own on this machine; if there is
    none, starts a local one (RAY_ADDRESS=local always does). Joining sends the user's token, so
    another user's Ray is joined only if RAY_ADDRESS names it.

    The code that runs here is sent to the cluster, or copied for a local Ray, so that workers never
    run another version of it. With `own`, a local cluster is always started. `local` is passed to
    `ray.init` when one starts. `name` is what Ray's dashboard calls this job. SIGTERM and SIGUSR1
    raise SystemExit from here on (ending.py).

    Raises:
        ClusterError: the cluster refuses the connection, does not answer, or has other versions; or
            a local Ray does not start.
    """
    import ray

    protect_token()
    # Workers may stay in the folder that Ray gives them: every path in Manta is absolute.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # How soon Ray Train notices that a worker died or finished. Its own 2 s would be lost twice.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A node may die while workers start: an elastic run asks for fewer workers after this.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    # How soon it hears that a node is to leave, which a cloud may say 30 s ahead; else up to 5 s.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what it prints is made visible (terminal.py)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    has_logs = os.environ.get("MANTA_WORKER_LOGS") == "1"
    common: dict[str, Any] = {
        "log_to_driver": has_logs,
        "logging_level": logging.WARNING,
        "configure_logging": True,
        "job_config": dashboard.job_config(name),
    }
    named = os.environ.get("RAY_ADDRESS")
    found = own_address() if named in (None, "", "auto") else named
    if not own and found not in (None, "local"):
        os.environ.setdefault(*TRAIN_RECORDS)
        _watch_for_leaving_nodes(WATCHES)
        _join(found, {**common, "runtime_env": {"py_modules": [str(PACKAGE)]}})
        ending.obey()
        dashboard.name_submitted(name)
        print(f"joined Ray at {ray.get_runtime_context().gcs_address}", flush=True)
        return
    # Each prestarted worker costs an import of Ray, and a job may need fewer.
    for setting in ("RAY_enable_worker_prestart", "RAY_prestart_worker_first_driver"):
        os.environ.setdefault(setting, "0")
    _watch_for_leaving_nodes(NOBODY_LEAVES)
    store = {"object_store_memory": LOCAL_OBJECT_STORE_BYTES, "include_dashboard": False}
    stay_on_loopback()
    with (
        _apart_from_this_group(),
        starting.without_spare_processes(has_logs),
        starting.importing(PACKAGE),
    ):
        starting.start(functools.partial(_init_local, {**common, **store, **local}))
    lifeline.watch()
    ending.obey()
    protect_token()  # Ray may have just made it
    why = "; the Ray of another user was not joined" if not own and others_run_ray() else ""
    print(f"started a local Ray for this job{why}", flush=True)


def _watch_for_leaving_nodes(value: str) -> None:
    if os.environ.get(WATCHER) in (None, WATCHES, NOBODY_LEAVES):
        os.environ[WATCHER] = value


_APART = threading.Event()
if sys.platform == "linux":  # (elsewhere Ray ends its processes by their group)
    os.register_at_fork(after_in_child=lambda: _go_apart() if _APART.is_set() else None)


def _go_apart() -> None:
    os.setpgrp()
    # Slurm may send this signal to all processes of a job's step: it is for the job alone, and a
    # program that the child starts goes on ignoring it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def _apart_from_this_group() -> Iterator[None]:
    """Keeps the processes that Ray starts in this block out of this process's group, and has them
    ignore SIGUSR1.

    What ends a job (`timeout`, a batch system, Ctrl-C) often signals its whole group. This process
    answers by saving, and needs its Ray for that. Ray ends with this process in any case.
    """
    _APART.set()
    try:
        yield
    finally:
        _APART.clear()


def _init_local(arguments: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address="local", **arguments)
    except BaseException:
        ray.shutdown()  # what Ray remembers of this try
        raise


def _join(address: str, common: dict[str, Any]) -> None:
    """Joins the cluster at this address.

    Raises:
        ClusterError: it refuses the connection or does not answer.
    """
    import ray

    if _is_loopback(address) and address in _addresses_of_own_raylets():
        stay_on_loopback()
    try:
        ray.init(address=address, **common)
    except ConnectionError as e:
        reason = " ".join(str(e).split())[:160]
        raise ClusterError(
            f"the Ray at {address} refuses the connection or does not answer ({reason}). If "
            "it asks for a token, run `export RAY_AUTH_MODE=token`; if it is gone, run `ray stop` "
            "and unset RAY_ADDRESS, or start one with `python -m manta.cluster up`"
        ) from None
    except Exception as e:
        if is_refusal(e):
            raise ClusterError(AUTH_HINT) from None
        if versions := other_versions(str(e)):
            raise ClusterError(f"the Ray at {address} runs on {versions}") from None
        raise


def other_versions(text: str) -> str | None:
    """What Ray says about a cluster with other versions than this process's, as the end of a
    sentence about the cluster; None if this text of an error is about something else."""
    found = OTHER_VERSIONS.search(text)
    if found is None:
        return None
    theirs, ours = (f"Python {found[n + 1]} and Ray {found[n]}" for n in (1, 3))
    return (
        f"{theirs}, this job on {ours}, and they must be the same: start the job with the "
        "cluster's versions (`ray job submit` runs it on the cluster itself), or start the "
        "cluster with this job's"
    )


def stay_on_loopback() -> None:
    """Makes Ray use 127.0.0.1 as this machine's address, here and in the processes that it starts,
    so that nothing of it listens on the network. (Elsewhere than on Linux, this is Ray's default.)
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # what Ray made of the variable when it was imported


def own_address() -> str | None:
    """The address of the Ray that this user has started on this machine; None if there is none.

    Ray's own search takes the address from any process whose command line looks like Ray's, and
    from a file that anyone may have written. Here both have to be this user's.
    """
    from ray._common.utils import get_ray_address_file

    file = Path(get_ray_address_file(None))
    try:
        with file.open() as f:
            is_ours = os.fstat(f.fileno()).st_uid == os.getuid()
            found = f.read(256).strip()
    except (OSError, ValueError):
        return None
    return found if is_ours and found in _addresses_of_own_raylets() else None


def others_run_ray() -> bool:
    """Whether another user's Ray runs on this machine."""
    return any(user != os.getuid() for user, _ in _raylets())


def _addresses_of_own_raylets() -> set[str]:
    flag = "--gcs-address="
    own = [words for user, words in _raylets() if user == os.getuid()]
    return {word.removeprefix(flag) for words in own for word in words if word.startswith(flag)}


def _raylets() -> Iterator[tuple[int, list[str]]]:
    """The user and the command line of each raylet on this machine: every node of Ray has one."""
    import psutil  # here, as only a process that looks for a Ray needs it

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words and Path(words[0]).name == "raylet":
                yield process.uids().real, words


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


def address() -> str:
    """The address of the joined cluster, for another process to join it (RAY_ADDRESS)."""
    import ray

    found: str = ray.get_runtime_context().gcs_address
    return found


def is_local() -> bool:
    """Whether this process is connected to a Ray that it has started itself."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def disconnect() -> None:
    """Leaves the cluster, if this process is in one."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def plain_name(name: str) -> str:
    """A name as Ray takes one for its own records: short, and of ASCII's letters alone."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100]
