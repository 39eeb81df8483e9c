"""What a driver and its workers tell each other, through queues of Ray's.

Ray's own forwarding of output puts a process's name before each line, and forwards every library's
chatter with it.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a run's workers have decided by their machines: for the driver, not for a person."""

    micro_batch: int
    """Sequences that a worker computes at once."""


@contextlib.contextmanager
def listening(handle: Callable[[Any], None]) -> Iterator[Any]:
    """A queue; what workers put into it is handled here, in order, until the block ends."""
    from ray.util.queue import Empty

    messages = _queue()
    stop = threading.Event()

    def listen() -> None:
        while True:
            try:
                handle(messages.get(timeout=0.5))
            except Empty:
                if stop.is_set():
                    return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        stop.set()
        thread.join(timeout=10)
        messages.shutdown(force=True)


@contextlib.contextmanager
def telling(to: Any) -> Iterator[Callable[[Any], None]]:
    """Puts into a queue of `listening`'s, in order, and does not wait for its process, as each
    logged step would for 4 ms on a busy machine. The end of the block does."""
    from ray.exceptions import RayError

    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = object()

    def pass_on() -> None:
        with contextlib.suppress(RayError):  # the driver is gone, and the queue with it
            while (message := waiting.get()) is not end:
                to.put(message)

    thread = threading.Thread(target=pass_on, name="manta-telling", daemon=True)
    thread.start()
    try:
        yield waiting.put
    finally:
        waiting.put(end)
        thread.join()


def _queue() -> Any:
    """Its process is on this node: another one may go, and this one goes with the driver."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


@contextlib.contextmanager
def requests() -> Iterator[Any]:
    """A queue for what a driver asks of its workers; `mailbox` is its other end."""
    asked = _queue()
    try:
        yield asked
    finally:
        asked.shutdown(force=True)


def mailbox(asked: Any, handle: Callable[[Any], None]) -> None:
    """Starts to hand over what arrives in a queue of `requests`, for as long as that lasts."""
    from ray.util.queue import Empty

    def listen() -> None:
        with contextlib.suppress(Exception):  # the driver is gone, and the queue with it
            while True:
                with contextlib.suppress(Empty):
                    handle(asked.get(timeout=60))

    threading.Thread(target=listen, name="manta-mailbox", daemon=True).start()
