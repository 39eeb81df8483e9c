"""Builds the engine for this machine from a config, and decides what only a worker can decide."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist

from manta.errors import ConfigError
from manta.model.attention import fused_kernels
from manta.model.cost import flops_per_token
from manta.model.families import model_of
from manta.model.gpt import LanguageModel, ModelConfig
from manta.model.init import initialise
from manta.model.lora import attach
from manta.model.memory import USABLE
from manta.model.trainable import freeze
from manta.train.fitting import largest_micro_batch
from manta.train.settings import TrainConfig, memory_setup
from manta.train.step.device import DTYPES, Device
from manta.train.step.engine import Engine

# A run is compiled if it would take more than this many seconds at the device's peak. A shorter one
# does not repay the compilation, which takes 20 to 60 s of the host. The GPU's limit is lower, as
# code that is not compiled loses a larger share of its speed there.
WORTH_COMPILING_SECONDS = {"cpu": 600, "cuda": 120}
USABLE_OF_HOST = 0.8


def compiles(c: TrainConfig, model: ModelConfig, device: Device) -> bool:
    """Whether to compile the blocks. Raises ConfigError if compile=blocks is impossible here."""
    if c.compile == "none":
        return False
    kind = device.torch_device.type
    missing = missing_to_compile(kind)
    if c.compile == "blocks":
        if missing:
            raise ConfigError(f"compile=blocks needs {missing}, or set compile=none")
        return True
    # At stage 3, DeepSpeed's hooks break each block's graph into many; no gain has been measured.
    if missing or c.zero_stage == 3:
        return False
    flops = (
        flops_per_token(model, c.sequence_length, c.trainable, c.lora) * c.total_tokens / c.workers
    )
    return flops / device.peak > WORTH_COMPILING_SECONDS[kind]


def missing_to_compile(kind: str) -> str | None:
    """What torch.compile's inductor lacks on this machine, and the remedy; None if nothing.

    For a CPU, inductor writes C++. For a GPU, Triton writes the kernels and builds their launcher
    from C. Both results are Python modules, so building them needs Python's headers."""
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton, and Python finds no package triton: install it (pip install triton)"
    # The compilers that inductor and Triton look for.
    variable, default = ("CC", "gcc clang") if kind == "cuda" else ("CXX", "g++")
    names = [os.environ[variable]] if variable in os.environ else default.split()
    if not any(map(shutil.which, names)):
        language = "a C compiler" if kind == "cuda" else "a C++ compiler"
        return (
            f"{language}, and {' or '.join(names)} is not on the PATH: install "
            f"{default.split()[0]} or name another one with {variable}"
        )
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").is_file():
        return (
            f"Python's headers, and {headers} has no Python.h: install its development package "
            f"(python{sys.version_info.major}.{sys.version_info.minor}-dev)"
        )
    return None


def slow_attention(c: TrainConfig, model: ModelConfig, device: Device) -> str | None:
    """A warning if attention on this GPU will keep all T x T scores in memory; None if a fused
    kernel avoids that."""
    if device.torch_device.type != "cuda" or c.document_mask or model.is_recurrent:
        return None
    if fused_kernels(device.torch_device, DTYPES[device.dtype], model.head_size):
        return None
    return (
        f"attention is slow here, and takes memory for all {c.sequence_length} x "
        f"{c.sequence_length} scores: {device.description} has no FlashAttention for heads of "
        f"{model.head_size} in {device.dtype} (it is for bf16, GPUs from Ampere on, and heads of "
        "at most 256)"
    )


def micro_batch(
    c: TrainConfig,
    model: ModelConfig,
    device: Device,
    local_workers: int,
    compiled: bool,
    share: float = 1.0,
) -> int:
    """Sequences that a worker computes at once; for `auto`, as many as fit its memory. `share`: its
    share of its GPU.

    Raises:
        ConfigError: not even one sequence fits; the message says what would make it fit.
    """
    if c.micro_batch_size != "auto":
        return c.micro_batch
    memory = memory_of_worker(c, device, local_workers, share)
    kind: Literal["cpu", "cuda"] = "cuda" if device.torch_device.type == "cuda" else "cpu"
    setup = memory_setup(c, model, device.dtype, kind, compiled)
    return largest_micro_batch(c, setup, memory)


def memory_of_worker(
    c: TrainConfig, device: Device, local_workers: int, share: float = 1.0
) -> float:
    """Bytes that a worker may use on its device; on a CPU, its share of the free memory."""
    if c.memory_per_worker is not None:
        return c.memory_per_worker * 2**30
    if device.torch_device.type == "cuda":
        return share * USABLE * torch.cuda.get_device_properties(device.torch_device).total_memory
    return USABLE_OF_HOST * psutil.virtual_memory().available / local_workers


def build(
    c: TrainConfig,
    model: ModelConfig,
    device: Device,
    *,
    size: int,
    steps: int,
    compiled: bool,
    start: Callable[[LanguageModel], None] | None = None,
) -> Engine:
    """Builds a model in an engine for micro batches of `size`; an optimizer step has `steps` of
    these at first. `start`, called on rank 0, sets the model's weights. Without it, the weights are
    new, drawn from the config's seed by the device's own random number generator. All ranks start
    from rank 0's weights, which DeepSpeed sends to them. Only the weights that `c.trainable` names,
    or the adapters of `c.lora`, learn."""
    torch.manual_seed(c.seed)
    with device.torch_device:  # weights are made here, as drawing them on the host takes longer
        made = model_of(model)
        if c.lora.rank is not None:
            attach(made, c.lora)
        else:
            freeze(made, c.trainable)
    made.to(device.torch_device)  # some tensors are made on the CPU in any case
    if dist.get_rank() == 0:
        (start or functools.partial(initialise, c=c.init))(made)
    made.recompute = c.activation_checkpointing
    if compiled:
        made.compile_blocks()
    return Engine(
        made,
        c.optimizer,
        device,
        zero_stage=c.zero_stage,
        micro_batch_size=size,
        grad_accum_steps=steps,
        c=c.engine,
        lr_scales=c.lr_scales,
    )
