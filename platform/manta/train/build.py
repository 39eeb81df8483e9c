"""From a config to an engine on this machine: what only the worker can decide, and the engine."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from manta.errors import ConfigError
from manta.model.cost import flops_per_token
from manta.model.gpt import GPT, ModelConfig
from manta.model.init import initialise
from manta.model.memory import USABLE, largest_micro_batch
from manta.train.device import Device
from manta.train.engine import make_engine
from manta.train.settings import TrainConfig, memory_setup

WORTH_COMPILING_SECONDS = 600  # a compilation takes 20 to 60 s of a CPU
USABLE_OF_HOST = 0.8


def compiles(c: TrainConfig, model: ModelConfig, device: Device) -> bool:
    """Whether the blocks are compiled. Raises ConfigError when they are to be and cannot."""
    if c.compile == "none":
        return False
    if device.torch_device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        if c.compile == "auto":
            return False
        raise ConfigError(
            f"compile=blocks needs a C++ compiler, and {compiler} is not on the PATH: install g++, "
            "or set compile=none"
        )
    flops = flops_per_token(model, c.sequence_length) * c.total_tokens / c.workers
    return c.compile == "blocks" or flops / device.peak > WORTH_COMPILING_SECONDS


def micro_batch(c: TrainConfig, model: ModelConfig, device: Device, local_workers: int) -> int:
    """Sequences that a worker computes at once; for `auto`, by the memory that it finds.

    Raises:
        ConfigError: not even one fits; with what would make it fit.
    """
    if c.micro_batch_size != "auto":
        return c.micro_batch
    if c.memory_per_worker is not None:
        memory = c.memory_per_worker * 2**30
    elif device.torch_device.type == "cuda":
        memory = USABLE * torch.cuda.get_device_properties(device.torch_device).total_memory
    else:
        memory = USABLE_OF_HOST * psutil.virtual_memory().available / local_workers
    kind: Literal["cpu", "cuda"] = "cuda" if device.torch_device.type == "cuda" else "cpu"
    setup = memory_setup(c, model, device.dtype, kind)
    return largest_micro_batch(setup, memory, c.micro_batches)


def build(
    c: TrainConfig,
    model: ModelConfig,
    device: Device,
    *,
    size: int,
    steps: int,
    compiled: bool,
    start: Callable[[GPT], None] | None = None,
) -> Any:
    """A model in an engine for micro batches of `size`, of which `steps` make an optimizer step at
    first. `start`, on rank 0, gives it its weights; without, they are new, from the config's seed.
    All ranks start from rank 0's weights, which DeepSpeed sends them."""
    torch.manual_seed(c.seed)
    made = GPT(model).to(device.torch_device)
    if dist.get_rank() == 0:
        (start or functools.partial(initialise, c=c.init))(made)
    made.recompute = c.activation_checkpointing
    if compiled:
        made.compile_blocks()
    return make_engine(
        made,
        c.optimizer,
        device,
        zero_stage=c.zero_stage,
        micro_batch_size=size,
        grad_accum_steps=steps,
        c=c.engine,
        lr_scales=c.lr_scales,
    )
