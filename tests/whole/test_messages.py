"""Messages from thousands of ranks to one driver, through Ray's real queue."""

import contextlib
import resource
from typing import Any

import pytest
import ray

from manta import messages
from manta.cluster import capacity
from manta.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_session")

RANKS, PROCESSES, STEPS = 4096, 4, 2
MB = 1 << 10  # of ru_maxrss, which counts KB


def test_all_that_a_worker_says_arrives_in_order_before_it_ends() -> None:
    def work(queue: Any, count: int) -> None:
        with contextlib.suppress(DataError), messages.telling(queue) as say:
            for index in range(count):
                say(index)
            raise DataError("what ends the worker waits for what it has said")

    said: list[int] = []
    with messages.listening(said.append) as queue:
        ray.get(ray.remote(num_cpus=0)(work).remote(queue, 200))
    assert said == list(range(200))


def test_a_driver_hears_4096_ranks_that_all_speak_at_once() -> None:
    """Only rank 0 speaks in a run. Should all speak at the start and in each step, none of it is
    lost, each rank's lines stay in order, and the driver keeps none of it in memory."""

    def ranks(queue: Any, first: int, stop: int) -> None:
        for rank in range(first, stop):
            with messages.telling(queue) as say:
                for step in range(STEPS + 1):
                    say((rank, step, "a line of a rank, of about a hundred characters " * 2))

    reached = [0] * RANKS
    wrong: list[Any] = []

    def handle(message: Any) -> None:
        rank, step, _ = message
        if reached[rank] != step:
            wrong.append(message)
        reached[rank] = step + 1

    share = RANKS // PROCESSES
    with messages.listening(handle) as queue:
        remote = ray.remote(num_cpus=0)(ranks)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ray.get([remote.remote(queue, at, at + share) for at in range(0, RANKS, share)])
    assert not wrong and reached == [STEPS + 1] * RANKS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * MB


def test_nodes_are_counted_again_by_rays_own_counter() -> None:
    """An elastic run must not count on a node that has died since Ray's last count."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("nobody"))
    assert capacity.recount()
