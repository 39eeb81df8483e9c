"""Whether a cluster has room for the workers that a job asks for."""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from manta.errors import ClusterError

# When a wait is first spoken of, and then how often, in seconds.
FIRST_LINE, NEXT_LINES = 30.0, 600.0
# How often a request for nodes is repeated, and how long it lives, in seconds: it does not outlive
# its job, however that ends.
REPEATED, EXPIRES = 10.0, 60.0
# How long a wait sleeps between two looks at the cluster, and the most that a withdrawal takes.
PAUSE, WITHDRAWAL = 0.5, 5.0


def require(
    num_workers: int,
    cpus: float,
    gpus: float,
    wait_seconds: float,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    told: Callable[[], Any] = lambda: None,
) -> None:
    """Checks that the cluster has room for these workers, each with `cpus` CPUs and `gpus` GPUs.

    The check is immediate. With `wait_seconds`, it asks an autoscaling cluster for the workers and
    waits up to that long for it to grow; `say` gets lines about the wait. The wait also ends when
    `told()` is true, and then this returns whether there is room or not.

    Raises:
        ClusterError: the cluster does not have the room.
    """
    if gpus and sys.platform == "darwin":  # Ray counts a Mac's GPU as a GPU
        raise ClusterError(
            "Manta computes on GPUs through CUDA, which a Mac's lacks: set gpus_per_worker=0 "
            "(jobs/evaluate.py: gpus=0)"
        )
    if workers_that_fit(cpus, gpus) >= num_workers:
        return
    if wait_seconds:
        _wait(num_workers, cpus, gpus, wait_seconds, say, told)
        if told():
            return
    fits = workers_that_fit(cpus, gpus)
    if fits < num_workers:
        raise ClusterError(
            f"num_workers={num_workers} workers of {_words(_bundle(cpus, gpus))} each do not fit: "
            f"the cluster has {_has()}, room for {fits}. "
            + (f"Set num_workers={fits}, or add nodes" if fits else "Add nodes, or larger ones")
            + (
                f" ({wait_seconds:g} s have passed; {autoscaler()})"
                if wait_seconds
                else " (an autoscaling cluster: set wait_seconds=600)"
            )
        )


def _wait(
    num_workers: int,
    cpus: float,
    gpus: float,
    wait_seconds: float,
    say: Callable[[str], None],
    told: Callable[[], Any],
) -> None:
    """Waits until the workers fit, the time is over, or `told()` is true."""
    bundle = _bundle(cpus, gpus)
    started = time.monotonic()
    asked, line = -REPEATED, FIRST_LINE
    with _request([bundle] * num_workers) as ask:
        while (fits := workers_that_fit(cpus, gpus)) < num_workers and not told():
            waited = time.monotonic() - started
            if waited >= wait_seconds:
                return
            if waited - asked >= REPEATED:
                ask()
                asked = waited
            if waited >= line:
                say(
                    f"waiting for nodes ({waited:.0f} of {wait_seconds:g} s): {num_workers} x "
                    f"{_words(bundle)} wanted; the cluster has {_has()}, room for {fits}; "
                    f"{autoscaler()}"
                )
                line = waited + NEXT_LINES
            time.sleep(min(PAUSE, wait_seconds - waited))


@contextlib.contextmanager
def _request(bundles: list[dict[str, float]]) -> Iterator[Callable[[], None]]:
    """A function that asks the cluster's autoscaler for room for these bundles, and has to be
    called again every REPEATED seconds. The end of the block takes the request back.

    Ray keeps one request per cluster, which lasts until it is replaced. Its coordinator, which Ray
    Data and Ray Train use too, adds up what everybody asks for, and forgets what nobody repeats.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as ray_data

    coordinator = ray_data.DefaultAutoscalingCoordinator(f"manta-{uuid.uuid4().hex}")
    try:
        yield lambda: coordinator.request_resources(bundles, expire_after_s=EXPIRES)
    finally:
        coordinator.cancel_request()
        recount(WITHDRAWAL)  # its answer follows the withdrawal, which is lost if we end before


def autoscaler() -> str:
    """What the cluster's autoscaler says about nodes that it starts, in a line."""
    import ray
    from ray._private import ray_constants
    from ray.autoscaler._private.commands import debug_status
    from ray.experimental import internal_kv

    status, error = (
        internal_kv._internal_kv_get(key)
        for key in (ray_constants.DEBUG_AUTOSCALING_STATUS, ray_constants.DEBUG_AUTOSCALING_ERROR)
    )
    address = ray.get_runtime_context().gcs_address
    return in_short(debug_status(status, error, address=address))


def in_short(status: str) -> str:
    """The pending nodes and the recent failures in the text of `ray status`, in a line."""
    found = []
    lines = [line.strip() for line in status.splitlines()]
    for title in ("Pending:", "Recent failures:"):
        if title in lines:
            rest = lines[lines.index(title) + 1 :]
            end = next((i for i, line in enumerate(rest) if not line or line.endswith(":")), None)
            found.append(f"{title.lower()} {', '.join(rest[:end])}")
    if not found:
        return "it has no autoscaler: only a person can add nodes"
    return f"its autoscaler says {'; '.join(found)}"


def workers_that_fit(cpus: float, gpus: float) -> int:
    """How many workers of `cpus` CPUs and `gpus` GPUs fit on the nodes. A worker is on one node; a
    worker's share of a GPU is on one GPU."""
    import ray

    bundle = _bundle(cpus, gpus)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(_times(name, n, node) for name, n in bundle.items()) for node in alive)


def leaving() -> set[str]:
    """The ids of the nodes that are about to leave, of which Ray has been told."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def recount(seconds: float = 10.0) -> bool:
    """Makes Ray count its nodes again, before it decides how many workers an elastic run gets.
    Returns whether it did, within this time.

    By itself Ray counts every 20 s. In between it takes a dead node for a live one, and waits
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S for workers that cannot start. (Nobody else needs the
    count: if it fails, Ray's own count follows.)
    """
    import ray
    from ray.exceptions import RayError

    name = "AutoscalingCoordinator"  # an actor of Ray's, of that name in the namespace of that name
    with contextlib.suppress(ValueError, RayError):  # (ValueError: there is none yet)
        counter: Any = ray.get_actor(name, namespace=name)
        ray.get(counter.get_reserved_resources.remote("manta", recompute=True), timeout=seconds)
        return True
    return False


def _times(name: str, each: float, node: dict[str, float]) -> int:
    """How many times `each` of a resource fits on a node; a share of a GPU cannot span two GPUs."""
    has = node.get(name, 0)
    return int(has) * int(1 / each) if name == "GPU" and each < 1 else int(has / each)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: float(n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}


def _words(bundle: dict[str, Any]) -> str:
    return " and ".join(f"{n:g} {name}" for name, n in bundle.items())


def _has() -> str:
    import ray

    has = ray.cluster_resources()
    return f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
