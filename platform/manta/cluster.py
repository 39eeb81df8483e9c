"""The connection to Ray: starts or joins a cluster, sends it this code, asks what it has."""

import contextlib
import ipaddress
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manta
from manta.errors import ClusterError

AUTH_HINT = (
    "Ray's cluster asks for a token: run `export RAY_AUTH_MODE=token` in this shell (and copy the "
    "cluster's ~/.ray/auth_token here when it runs on another machine), then try again"
)
TOKEN_FILE = Path("~/.ray/auth_token")
LOCAL_OBJECT_STORE_BYTES = 512 << 20


def connect(own: bool = False, **local: Any) -> None:
    """Joins the cluster that RAY_ADDRESS names, or this user's own on this machine; if there is
    none, starts a local one (RAY_ADDRESS=local always does). Joining sends the user's token, so
    another user's Ray is joined only if RAY_ADDRESS names it.

    The code that runs here is sent to the cluster, so that workers never run another version of it.
    With `own`, a local cluster is always started. `local` is passed to `ray.init` when one starts.

    Raises:
        ClusterError: the cluster refuses the connection, or does not answer.
    """
    import ray

    protect_token()
    # Workers may stay in the folder that Ray gives them: every path in Manta is absolute.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # How soon Ray Train notices that a worker died or finished. Its own 2 s would be lost twice.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A node may die while workers start: an elastic run asks for fewer workers after this.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    package = Path(manta.__file__).parent
    common: dict[str, Any] = {
        "runtime_env": {"py_modules": [str(package)]},
        "log_to_driver": os.environ.get("MANTA_WORKER_LOGS") == "1",
        "logging_level": logging.WARNING,
        "configure_logging": True,
    }
    named = os.environ.get("RAY_ADDRESS")
    found = own_address() if named in (None, "", "auto") else named
    if not own and found not in (None, "local"):
        _join(found, common)
        print(f"joined Ray at {ray.get_runtime_context().gcs_address}", flush=True)
        return
    # Prestarted workers are useless here, since none of them has this code's environment, and each
    # one costs an import of Ray.
    for setting in ("RAY_enable_worker_prestart", "RAY_prestart_worker_first_driver"):
        os.environ.setdefault(setting, "0")
    store = {"object_store_memory": LOCAL_OBJECT_STORE_BYTES, "include_dashboard": False}
    stay_on_loopback()
    with _apart_from_this_group():
        ray.init(address="local", **common, **(store | local))
    protect_token()  # Ray may have just made it
    why = "; the Ray of another user was not joined" if not own and others_run_ray() else ""
    print(f"started a local Ray for this job{why}", flush=True)


_APART = threading.Event()
if sys.platform == "linux":  # (elsewhere Ray ends its processes by their group)
    os.register_at_fork(after_in_child=lambda: os.setpgrp() if _APART.is_set() else None)


@contextlib.contextmanager
def _apart_from_this_group() -> Iterator[None]:
    """Keeps the processes that Ray starts in this block out of this process's group.

    What ends a job (`timeout`, a batch system) often signals its whole group. This process answers
    SIGTERM by saving, and needs its Ray for that. Ray ends with this process in any case.
    """
    _APART.set()
    try:
        yield
    finally:
        _APART.clear()


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
            "and unset RAY_ADDRESS, or start one with `python -m manta.head up`"
        ) from None
    except Exception as e:
        if is_refusal(e):
            raise ClusterError(AUTH_HINT) from None
        raise


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


def disconnect() -> None:
    """Leaves the cluster, if this process is in one."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def is_refusal(error: BaseException) -> bool:
    """Whether an error from Ray means that our token is missing or wrong."""
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("unauthorized", "unauthenticated", "auth_token", "401"))


def plain_name(name: str) -> str:
    """A name as Ray takes one for its own records: short, and of ASCII's letters alone."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100]


def require(num_workers: int, cpus: float, gpus: float, wait_seconds: float) -> None:
    """Checks that the cluster has room for these workers, each with `cpus` CPUs and `gpus` GPUs.

    The check is immediate. With `wait_seconds`, it asks an autoscaling cluster for the workers and
    waits up to that long for it to grow.

    Raises:
        ClusterError: the cluster does not have the room.
    """
    if gpus and sys.platform == "darwin":  # Ray counts a Mac's GPU as a GPU
        raise ClusterError(
            "Manta computes on GPUs through CUDA, which a Mac's lacks: set gpus_per_worker=0 "
            "(jobs/evaluate.py: gpus=0)"
        )
    import ray
    from ray.autoscaler.sdk import request_resources

    bundle = _bundle(cpus, gpus)
    deadline = time.monotonic() + wait_seconds
    if wait_seconds and capacity(cpus, gpus) < num_workers:
        request_resources(bundles=[bundle] * num_workers)
    while (fits := capacity(cpus, gpus)) < num_workers:
        if time.monotonic() >= deadline:
            has = ray.cluster_resources()
            each = " and ".join(f"{n:g} {name}" for name, n in bundle.items())
            raise ClusterError(
                f"num_workers={num_workers} workers of {each} each do not fit: the cluster has "
                f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, room for {fits}. "
                f"Set num_workers={max(fits, 1)}, or add nodes"
                + ("" if wait_seconds else " (an autoscaling cluster: set wait_seconds=600)")
            )
        time.sleep(1.0)


def capacity(cpus: float, gpus: float) -> int:
    """How many workers of `cpus` CPUs and `gpus` GPUs fit on the nodes. A worker is on one node; a
    worker's share of a GPU is on one GPU."""
    import ray

    bundle = _bundle(cpus, gpus)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(_times(name, n, node) for name, n in bundle.items()) for node in alive)


def recount() -> bool:
    """Makes Ray count its nodes again, before it decides how many workers an elastic run gets.
    Returns whether it did.

    By itself Ray counts every 20 s. In between it takes a dead node for a live one, and waits
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S for workers that cannot start. (Nobody else needs the
    count: if it fails, Ray's own count follows.)
    """
    import ray
    from ray.exceptions import RayError

    name = "AutoscalingCoordinator"  # an actor of Ray's, of that name in the namespace of that name
    with contextlib.suppress(ValueError, RayError):  # (ValueError: there is none yet)
        counter: Any = ray.get_actor(name, namespace=name)
        ray.get(counter.get_reserved_resources.remote("manta", recompute=True), timeout=10)
        return True
    return False


def protect_token() -> None:
    """Makes the file of Ray's token readable by its owner alone: Ray can write it with mode 0644.

    Raises:
        ClusterError: others can read the file, and its mode cannot be changed.
    """
    file = TOKEN_FILE.expanduser()
    if not file.is_file() or not stat.S_IMODE(file.stat().st_mode) & 0o077:
        return
    try:
        file.chmod(0o600)
    except OSError:
        raise ClusterError(
            f"others can read {file}, the token that lets them run code as you; run "
            f"`chmod 600 {file}`"
        ) from None


def _times(name: str, each: float, node: dict[str, float]) -> int:
    """How many times `each` of a resource fits on a node; a share of a GPU cannot span two GPUs."""
    has = node.get(name, 0)
    return int(has) * int(1 / each) if name == "GPU" and each < 1 else int(has / each)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: float(n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
