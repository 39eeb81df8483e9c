"""Items that a thread draws ahead of time."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Ahead(Iterator[T]):
    """The same items, drawn ahead of time by a thread that starts at once.

    The first batch of a stream takes seconds, in which the worker can build its model. At most
    `depth` items wait at a time.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self._waiting: queue.Queue[T | BaseException | None] = queue.Queue(depth)
        self._is_closed = threading.Event()
        # The thread has no reference to `self`, so `self` is freed when nobody else has one.
        arguments = (items, self._waiting, self._is_closed)
        threading.Thread(target=_draw, args=arguments, daemon=True).start()

    def __next__(self) -> T:
        item = self._waiting.get()
        if item is None or isinstance(item, BaseException):
            self._waiting.put(None)
            raise item or StopIteration
        return item

    def close(self) -> None:
        """Ends the thread, and with it the stream that it draws from."""
        self._is_closed.set()

    def __del__(self) -> None:
        self.close()


def _draw(items: Iterator[Any], waiting: queue.Queue[Any], is_closed: threading.Event) -> None:
    def give(item: Any) -> None:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.5)
                return

    try:
        for item in items:
            give(item)
            if is_closed.is_set():
                break
        give(None)
    except BaseException as e:
        give(e)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
