"""DeepSpeed itself, imported where it is first needed, and its config from Manta's plain keys."""

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
    """DeepSpeed for engines on such a device, imported where it is first needed: its import takes
    seconds, and the processes that only direct the training workers can do without.

    Raises:
        RuntimeError: this process has imported DeepSpeed for another kind of device.
    """
    # It asks once for each process, at its import, and would take the GPU that it sees, or a Mac's,
    # whatever the model is on.
    os.environ["DS_ACCELERATOR"] = device_type
    # Its import and start-up talk; what matters of it reaches a person as an error.
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
    # DeepSpeed asks this which of its own operations it may compile. Left alone, it tries each of
    # them, which starts compilers, and prints. It needs none: the one that it would take on a CPU,
    # deepspeed_shm_comm, is for inference, and takes 40 s.
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
    """What DeepSpeed is told, with `c.deepspeed_json` over what Manta says."""
    rounded = c.communication_dtype == "bf16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0 `Engine.step` clips.
        "gradient_clipping": optimizer.grad_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **_zero_settings(c, zero_stage, device)},
        "zero_allow_untested_optimizer": True,
        # Its own AdamW for the CPU is compiled at the first use; torch's is fused as well.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": device.dtype == "bf16",
            "dtype": "bfloat16",
            # Whose gradients are reduced in bf16. (In fp32, the next key says it for all.)
            "lower_precision_safe_modules": _module_types(model) if rounded else [],
        },
        "communication_data_type": c.communication_dtype,
        "steps_per_print": 1 << 40,
        # It waits for the device before and after each micro batch; `Meter` takes the time.
        "timers": {"throughput": {"enabled": False}},
    }
    return merged(settings, c.extra())


def _module_types(model: nn.Module) -> list[str]:
    """The types of module that have weights of their own, as DeepSpeed names them."""
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
    """Raises ConfigError where this machine cannot offload to its disk."""
    if c.offload_path is None:
        return
    folder = Path(storage.absolute(c.offload_path))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"engine.offload_path={folder}: no folder that this worker can write to; make it on "
            "every machine, or set engine.offload_optimizer=cpu"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "offloading to nvme needs libaio, which this machine lacks: install libaio-dev, or set "
            "engine.offload_optimizer=cpu and engine.offload_parameters=cpu"
        )
