"""Messages between a driver and its workers, through Ray's queues.

Ray can forward workers' output by itself, but then puts a process's name in front of each line and
forwards the chatter of every library too.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Decided:
    """Values that a run's workers chose to fit their machines: for the driver, not for a person."""

    micro_batch: int
    """Number of sequences that a worker computes at once."""


@dataclasses.dataclass(frozen=True)
class Hanging:
    """A worker that has made no progress, and where its stacks are. All other workers wait for one
    that hangs, so each of them says this."""

    rank: int
    seconds: float
    path: str


@dataclasses.dataclass(frozen=True)
class Logged:
    """Rank 0 has written records: those of the steps since the last line, or of an evaluation."""

    records: list[dict[str, Any]]
    seconds: dict[str, float]
    """What the run's time went to, by cause, since its first start."""
    starts: int
    """How often the workers have started."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    seconds: float
    """Seconds that it took to be written."""
    paused: float
    """Seconds that training paused for it."""


@dataclasses.dataclass(frozen=True)
class WentBack:
    """The run has gone back to before a loss spike."""

    why: str


@contextlib.contextmanager
def listening(handle: Callable[[Any], None]) -> Iterator[Any]:
    """A queue for workers to put messages into. `handle` gets each here, in order, until the block
    ends. What has come together is fetched together: thousands of workers may speak at once."""
    from ray.util.queue import Empty

    messages = _queue()
    stop = threading.Event()

    def listen() -> None:
        while True:
            try:
                handle(messages.get(timeout=0.5))
                while count := messages.qsize():
                    for message in messages.get_nowait_batch(count):
                        handle(message)
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
    """A function that puts messages into a queue of `listening`, in order, without waiting for the
    queue's process: on a busy machine each logged step would wait 4 ms. The end of the block
    waits until all are sent."""
    from ray.exceptions import RayError

    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = object()

    def pass_on() -> None:
        said, is_heard = [waiting.get()], True
        while end not in said:
            said += [waiting.get_nowait() for _ in range(waiting.qsize())]  # only this thread takes
            lines = [message for message in said if message is not end]
            try:
                if lines and is_heard:
                    to.put_nowait_batch(lines)
            except RayError:  # the driver is gone, and the queue with it
                is_heard = False
            said = [end] if end in said else [waiting.get()]

    thread = threading.Thread(target=pass_on, name="manta-telling", daemon=True)
    thread.start()
    try:
        yield waiting.put
    finally:
        waiting.put(end)
        thread.join()


def _queue() -> Any:
    """A queue whose process is on this node: it is not lost with another node, and ends with the
    driver."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


@contextlib.contextmanager
def requests() -> Iterator[Any]:
    """A queue for a driver's requests to its workers; `mailbox` is its other end."""
    asked = _queue()
    try:
        yield asked
    finally:
        asked.shutdown(force=True)


def mailbox(asked: Any, handle: Callable[[Any], None]) -> None:
    """Starts a thread that gives `handle` what arrives in a queue of `requests`, until the queue
    ends."""
    from ray.util.queue import Empty

    def listen() -> None:
        with contextlib.suppress(Exception):  # the driver is gone, and the queue with it
            while True:
                with contextlib.suppress(Empty):
                    handle(asked.get(timeout=60))

    threading.Thread(target=listen, name="manta-mailbox", daemon=True).start()
