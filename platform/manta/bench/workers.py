"""Processes on this machine that train together, without Ray."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

from manta.errors import MantaError

FOUND = "found.json"


def together(count: int, backend: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns on the first of `count` workers, each of which runs it, in
    one process group; of one alone, in this process, and of more as JSON brings it back. `work`
    is a function of a module, as is what `arguments` hold.

    Raises:
        MantaError: the first worker's own.
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


def _write(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> None:
    if backend == "nccl":  # each sees its own, as Ray has it
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = known.split(",") if known else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank]
    try:
        result = {"found": _member(rank, count, folder, backend, work, arguments)}
    except MantaError as e:  # on all of them alike, and an exception's class would be lost
        result = {"problem": str(e)}
    if rank == 0:
        Path(folder, FOUND).write_text(json.dumps(result))


def _member(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> Any:
    # DeepSpeed asks for these, though the group is there.
    os.environ["LOCAL_RANK"] = "0" if backend == "nccl" else str(rank)
    store = dist.FileStore(str(Path(folder, "ranks")), count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()
