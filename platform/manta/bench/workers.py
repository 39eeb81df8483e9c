"""Runs a function in processes on this machine that train together, without Ray."""

import contextlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

from manta.errors import MantaError

FOUND = "found.json"


def together(count: int, backend: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `work(*arguments)` on `count` workers in one process group. Returns the first worker's
    result. A single worker runs in this process; from several, the result comes back as JSON.
    `work`, and any function among `arguments`, must be defined at the top level of a module.

    Raises:
        MantaError: the first worker's own MantaError.
    """
    with tempfile.TemporaryDirectory() as folder:
        if count == 1:
            return _member(0, 1, folder, backend, work, arguments)
        job = (count, folder, backend, work, arguments)
        torch.multiprocessing.start_processes(_write, job, nprocs=count, start_method="spawn")
        result = json.loads(Path(folder, FOUND).read_text())
        if "problem" in result:
            raise MantaError(result["problem"])
        return result["found"]


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
        _see_only(first + rank)
    try:
        _member(rank, count, folder, backend, serve, ())
    except MantaError as e:
        end.send(e)


def _see_only(gpu: int) -> None:
    """Makes this process see only one GPU, as under Ray."""
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = known.split(",")[gpu] if known else str(gpu)


def _write(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> None:
    if backend == "nccl":
        _see_only(rank)
    try:
        result = {"found": _member(rank, count, folder, backend, work, arguments)}
    except MantaError as e:  # all workers raise it; `spawn` would lose its class
        result = {"problem": str(e)}
    if rank == 0:
        Path(folder, FOUND).write_text(json.dumps(result))


def _member(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> Any:
    before = dict(os.environ)  # a single worker is the caller's own process
    # DeepSpeed reads this variable even if the process group exists.
    os.environ["LOCAL_RANK"] = "0" if backend == "nccl" else str(rank)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as under Ray
    store = dist.FileStore(str(Path(folder, "ranks")), count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()
        for name in ("LOCAL_RANK", "TORCH_GLOO_LAZY_INIT"):
            os.environ.pop(name)
            os.environ |= {name: before[name]} if name in before else {}
