"""Workers on this machine that train together, without Ray, and wait until they are told to."""

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from manta.errors import MantaError
from manta.train.alone import member, see_only


class Crew:
    """Workers on this machine in one process group, which wait without computing until they are
    told what to do. Several crews can be measured in turn, or at once."""

    def __init__(self, ends: list[Connection]):
        self._ends = ends

    def tell(self, command: Any) -> None:
        """Tells all workers to begin."""
        for end in self._ends:
            end.send(command)

    def answers(self) -> list[Any]:
        """Waits for all workers. Returns what each one answers, by rank.

        Raises:
            MantaError: a worker's own MantaError.
            RuntimeError: a worker failed otherwise; it has printed why.
        """
        try:
            answers = [end.recv() for end in self._ends]
        except EOFError:
            raise RuntimeError("a worker of the bench has failed; its error is above") from None
        for answer in answers:
            if isinstance(answer, MantaError):
                raise answer
        return answers


@contextlib.contextmanager
def crew(
    count: int, backend: str, first: int, make: Callable[..., Any], *arguments: Any
) -> Iterator[Crew]:
    """A crew of `count` workers, which end with the context. In each one, `make(*arguments)` gives
    the function that answers a command. With nccl, they have the GPUs from number `first` on."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe() for _ in range(count)]
        job = (count, folder, backend, make, arguments)
        workers = [
            spawn.Process(target=_obey, args=(end, rank, first, *job), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        for worker, (_, end) in zip(workers, pipes, strict=True):
            worker.start()
            end.close()  # so that `recv` ends if the worker does
        made = Crew([end for end, _ in pipes])
        try:
            made.answers()  # that they are ready
            yield made
            with contextlib.suppress(BrokenPipeError):  # one that has failed
                made.tell(None)
            for worker in workers:
                worker.join(timeout=30)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _obey(
    end: Connection,
    rank: int,
    first: int,
    count: int,
    folder: str,
    backend: str,
    make: Any,
    arguments: Any,
) -> None:
    def serve() -> None:
        answer = make(*arguments)
        end.send(None)
        while (command := end.recv()) is not None:
            end.send(answer(command))

    if backend == "nccl":
        see_only(first + rank)
    try:
        member(rank, count, folder, backend, serve, ())
    except MantaError as e:
        end.send(e)
