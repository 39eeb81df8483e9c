"""Runs a function in processes on this machine that train together, without Ray."""

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


def _write(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> None:
    if backend == "nccl":  # each worker sees only its own GPU, as under Ray
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = known.split(",") if known else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank]
    try:
        result = {"found": _member(rank, count, folder, backend, work, arguments)}
    except MantaError as e:  # all workers raise it; `spawn` would lose its class
        result = {"problem": str(e)}
    if rank == 0:
        Path(folder, FOUND).write_text(json.dumps(result))


def _member(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> Any:
    # DeepSpeed reads this variable even if the process group exists.
    os.environ["LOCAL_RANK"] = "0" if backend == "nccl" else str(rank)
    store = dist.FileStore(str(Path(folder, "ranks")), count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()
