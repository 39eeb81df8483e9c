"""Imports DeepSpeed where it is first needed, and makes its config from Manta's keys."""

import functools
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from manta import storage
from manta.config import merged
from manta.errors import ConfigError
from manta.model.memory import BUCKET_MB
from manta.train.step.device import Device
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig


@functools.cache
def import_deepspeed(device_type: str) -> Any:
    """Imports DeepSpeed for engines on devices of this type, and returns the module.

    The import takes seconds, and the processes that only direct the training workers do not need
    DeepSpeed, so it happens here and not at the top of the file.

    Raises:
        RuntimeError: this process has already imported DeepSpeed for another type of device.
    """
    # DeepSpeed picks its device once per process, at import. Left alone, it would pick any GPU that
    # it sees (a Mac's too), even if the model is elsewhere.
    os.environ["DS_ACCELERATOR"] = device_type
    # DeepSpeed prints a lot while it starts. Whatever matters reaches people as an error.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    taken = get_accelerator().device_name()
    if taken != device_type:
        raise RuntimeError(
            f"DeepSpeed was imported for {taken} in this process, and cannot train on {device_type}"
        )
    # DeepSpeed looks up here which of its own operations it may compile. Left alone, it tries each
    # of them, which starts compilers and prints. Manta needs none of them: the one that DeepSpeed
    # would use on a CPU, deepspeed_shm_comm, is for inference and takes 40 s to compile.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def deepspeed_config(
    model: nn.Module,
    optimizer: OptimizerConfig,
    device: Device,
    *,
    zero_stage: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    c: EngineConfig,
) -> dict[str, Any]:
    """DeepSpeed's config: what Manta sets, overridden by `c.deepspeed_json`."""
    rounded = c.communication_dtype == "bf16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0, `Engine.step` clips.
        "gradient_clipping": optimizer.grad_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **_zero_settings(c, zero_stage, device)},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for CPUs is compiled at first use; torch's is fused as well.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": device.dtype == "bf16",
            "dtype": "bfloat16",
            # The gradients of these modules are reduced in bf16. (For fp32, the next key alone
            # decides.)
            "lower_precision_safe_modules": _module_types(model) if rounded else [],
        },
        "communication_data_type": c.communication_dtype,
        "steps_per_print": 1 << 40,
        # This timer waits for the device before and after each micro batch; `Meter` measures
        # throughput instead.
        "timers": {"throughput": {"enabled": False}},
    }
    return merged(settings, c.extra())


def _module_types(model: nn.Module) -> list[str]:
    """The module types that have weights of their own, by the names that DeepSpeed uses."""
    types = {
        type(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    }
    return sorted(f"{t.__module__}.{t.__name__}" for t in types)


def _zero_settings(c: EngineConfig, zero_stage: int, device: Device) -> dict[str, Any]:
    on_gpu = device.torch_device.type == "cuda"
    found: dict[str, Any] = {
        "reduce_bucket_size": c.reduce_bucket,
        "allgather_bucket_size": (c.allgather_bucket_mb or BUCKET_MB) * 10**6 // 4,
    }
    if zero_stage < 3 or c.overlap_comm is not None:
        found["overlap_comm"] = c.overlaps(zero_stage, dist.get_world_size(), on_gpu)
    offloaded = {"offload_optimizer": c.offload_optimizer, "offload_param": c.offload_parameters}
    for key, place in offloaded.items():
        if place != "none":
            found[key] = {"device": place}
        if place == "nvme":
            found[key]["nvme_path"] = storage.absolute(c.offload_path or "")
    return found


def check_disk(c: EngineConfig) -> None:
    """Raises ConfigError if `c` offloads to disk and this machine cannot."""
    if c.offload_path is None:
        return
    folder = Path(storage.absolute(c.offload_path))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"engine.offload_path={folder}: not a folder that this worker can write to; make it on "
            "every machine, or set engine.offload_optimizer=cpu"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "offloading to nvme needs libaio, which this machine lacks: install libaio-dev, or set "
            "engine.offload_optimizer=cpu and engine.offload_parameters=cpu"
        )
