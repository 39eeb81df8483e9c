"""Training steps on this machine, without Ray and without a stream of data.

A bench times them, and a plan's probe does; both have the engine and the model of a run.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from manta.errors import MantaError
from manta.train.build import build, compiles, micro_batch
from manta.train.objectives.next_token import Batch
from manta.train.settings import PretrainConfig
from manta.train.step.device import Device

FOUND = "found.json"


class Step:
    """One optimizer step over random tokens, made of the same parts as in the training loop."""

    def __init__(self, c: PretrainConfig, device: Device):
        self.model, self.device = c.expected_model, device
        self.compiled = compiles(c, self.model, device)
        self.size = micro_batch(c, self.model, device, c.workers, self.compiled)
        c = dataclasses.replace(c, micro_batch_size=self.size)
        self.accum = c.grad_accum_steps(c.total_steps)
        self.grad_clip = c.optimizer.grad_clip
        self.engine = build(
            c, self.model, device, size=self.size, steps=self.accum, compiled=self.compiled
        )
        assert self.model.vocab_size is not None
        shape = (self.size, c.sequence_length + 1)
        ids = np.random.default_rng(c.seed).integers(self.model.vocab_size, size=shape)
        self.batch = Batch(ids)

    def run(self, timed: Callable[[str], None] = lambda _: None) -> Tensor:
        """Runs the step. Returns the loss of the last micro batch, still on the device."""
        with self.engine.casting_once():
            for index in range(self.accum):
                tokens, targets = self.batch.to(self.device.torch_device)
                timed("data")
                loss = self.engine(tokens, targets)
                timed("forward")
                self.engine.backward(loss, is_last=index == self.accum - 1)
                timed("backward")
        self.engine.step(self.grad_clip)
        timed("optimizer")
        return loss.detach()

    def wait(self) -> None:
        if self.device.torch_device.type == "cuda":
            torch.cuda.synchronize()


def together(
    count: int, backend: str, work: Callable[..., Any], *arguments: Any, apart: bool = False
) -> Any:
    """Runs `work(*arguments)` on `count` workers in one process group. Returns the first worker's
    result. A single worker runs in this process, unless it is to be `apart`; from others, the
    result comes back as JSON. `work`, and any function among `arguments`, must be defined at
    the top level of a module.

    Raises:
        MantaError: the first worker's own MantaError.
    """
    with tempfile.TemporaryDirectory() as folder:
        if count == 1 and not apart:
            return member(0, 1, folder, backend, work, arguments)
        job = (count, folder, backend, work, arguments)
        torch.multiprocessing.start_processes(_write, job, nprocs=count, start_method="spawn")
        result = json.loads(Path(folder, FOUND).read_text())
        if "problem" in result:
            raise MantaError(result["problem"])
        return result["found"]


def see_only(gpu: int) -> None:
    """Makes this process see only one GPU, as under Ray."""
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = known.split(",")[gpu] if known else str(gpu)


def _write(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> None:
    if backend == "nccl":
        see_only(rank)
    try:
        result = {"found": member(rank, count, folder, backend, work, arguments)}
    except MantaError as e:  # all workers raise it; `spawn` would lose its class
        result = {"problem": str(e)}
    if rank == 0:
        Path(folder, FOUND).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # At a regular end, a thread of gloo's that drops the last all-reduce may want the interpreter
    # while it is being taken down, and aborts the process (a time in twenty).
    os._exit(0)


def member(rank: int, count: int, folder: str, backend: str, work: Any, arguments: Any) -> Any:
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
