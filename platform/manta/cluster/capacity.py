"""Whether a cluster has room for the workers that a job asks for."""

import sys
import time

from manta.errors import ClusterError


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
    if wait_seconds and workers_that_fit(cpus, gpus) < num_workers:
        request_resources(bundles=[bundle] * num_workers)
    while (fits := workers_that_fit(cpus, gpus)) < num_workers:
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


def workers_that_fit(cpus: float, gpus: float) -> int:
    """How many workers of `cpus` CPUs and `gpus` GPUs fit on the nodes. A worker is on one node; a
    worker's share of a GPU is on one GPU."""
    import ray

    bundle = _bundle(cpus, gpus)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(_times(name, n, node) for name, n in bundle.items()) for node in alive)


def _times(name: str, each: float, node: dict[str, float]) -> int:
    """How many times `each` of a resource fits on a node; a share of a GPU cannot span two GPUs."""
    has = node.get(name, 0)
    return int(has) * int(1 / each) if name == "GPU" and each < 1 else int(has / each)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: float(n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
